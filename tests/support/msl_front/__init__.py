"""A front end for Metal Shading Language on any machine, to say what Apple's compiler would object to.

clang compiles MSL here as the C++14 that it is made of: ``device``, ``constant`` and ``threadgroup`` are address spaces
of clang's, ``thread`` is the space of everything else, and metal_stdlib is declared in ``include/``. ``source.py``
reads attributes out of the text and spells in C++ what C++ lacks. ``rules.py`` and ``signatures.py`` add MSL's
restrictions: on the tokens, on clang's syntax tree, and on its IR, where of templates only what kernels call is left.
On the optimised IR, which ``ir.py`` reads, ``uniformity.py`` finds barriers, shuffles and matrices that not all threads
reach, ``memory.py`` what is certain to be unaligned, to wait for another threadgroup or to be read too early, and
``registers.py`` arrays that stay indexed by a variable.

What it does not model, and so refuses though MSL takes it:

- a structure or matrix in another space than ``thread`` that is copied, assigned or asked for a member function: C++
  has constructors, assignment and ``this`` for one space; fields, elements, scalars and vectors are fine;
- members qualified with an address space: those for ``thread`` stay, the others are left out;
- ``T(x)`` from one vector to another where T is a template's parameter; a vector type by its name, and ``(T)x``, are
  fine;
- ``boolN`` as the type of a vector comparison: clang's is a vector of integers, which ``all``, ``any`` and ``select``
  take;
- textures, samplers, ray tracing, tensors, and the names with which Apple implements its own library.

What it takes though MSL may not: it knows neither what a device supports nor how many registers a kernel has; and
Apple's metal_stdlib may have more names than ``metal_names.py``, with which one of ours could collide.
"""
