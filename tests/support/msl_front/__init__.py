"""A front end for Metal Shading Language on any machine: finds the errors that Apple's compiler would report.

clang compiles MSL as C++14. ``device``, ``constant`` and ``threadgroup`` are address spaces of clang's, ``thread`` is
the space of everything else, and metal_stdlib is declared in ``include/``. ``source.py`` reads attributes out of the
text, and spells in C++ the constructs that C++ lacks. ``rules.py`` and ``signatures.py`` add MSL's restrictions: on
the tokens, on clang's syntax tree, and on its IR, which has only the template instances that kernels call. ``ir.py``
reads the optimised IR. There ``uniformity.py`` finds barriers, shuffles and matrices that not all threads reach.
``memory.py`` finds accesses that are certain to be unaligned, to wait for another threadgroup, or to read too early.
``registers.py`` finds arrays that a variable still indexes. ``walk.py`` applies such a check to every kernel.

Not modelled, and so refused though MSL takes it:

- a structure or matrix in another space than ``thread`` that is copied, assigned or asked for a member function: C++
  has constructors, assignment and ``this`` for one space; fields, elements, scalars and vectors are fine;
- members qualified with an address space: those for ``thread`` stay, the others are left out;
- ``T(x)`` from one vector to another where T is a template's parameter; a vector type by its name, and ``(T)x``, are
  fine;
- ``boolN`` as the type of a vector comparison: clang's is a vector of integers, which ``all``, ``any`` and ``select``
  take;
- textures, samplers, ray tracing, tensors, and the names with which Apple implements its own library.

Accepted though MSL may refuse it: the front end knows neither a device's features nor a kernel's registers. Apple's
metal_stdlib may have more names than ``metal_names.py``, and one of ours could collide with them.
"""
