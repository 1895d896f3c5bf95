"""A front end for Metal Shading Language on any machine: clang, a metal_stdlib of declarations, and MSL's own rules."""
