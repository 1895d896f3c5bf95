// Every native kernel that reads weights, for the types of a group: see quant_types.h.
#pragma once

#include "cpu/native/embed.cpp"
#include "cpu/native/experts_few.cpp"
#include "cpu/native/experts_mm.cpp"
#include "cpu/native/experts_mv.cpp"
#include "cpu/native/products_few.cpp"
#include "cpu/native/products_mm.cpp"
#include "cpu/native/products_mv.cpp"
