"""Command ``zincmetal``: one module for each subcommand.

The modules share ``command.py`` (a subcommand as data), ``arguments.py`` (options) and ``output.py`` (streams).

Results go to standard output. Errors, warnings, figures and progress go to standard error; each message begins with
"zincmetal: ". The exit status:

====  =====================================================================================
0     done
1     an error, printed on standard error; also a failed check, and a model that does not fit
2     a wrong argument, printed on standard error
130   ended by Ctrl-C
====  =====================================================================================

A reader may close the pipe before the end, as ``head`` does. Then a command that only prints facts ends with 0. A
command whose work was cut short (run, chat, check) ends with 1. Neither prints a message.
"""
