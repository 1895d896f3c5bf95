"""The command ``zincmetal``: one module for each subcommand.

All of them share ``command.py`` (the parts of a subcommand), ``arguments.py`` (options) and ``output.py`` (streams).

Results go to standard output. Errors, warnings, figures and progress go to standard error; each message begins with
"zincmetal: ". The exit status:

====  =====================================================================================
0     done
1     an error, said on standard error; also a failed check, and a model that does not fit
2     a wrong argument, said on standard error
130   ended by Ctrl-C
====  =====================================================================================

A reader may close the pipe before the end, as ``head`` does. A command that only prints facts then ends with 0, and one
whose work was cut short (run, chat, check) with 1; neither says a word.
"""
