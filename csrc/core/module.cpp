// What differs from one extension module to another, compiled once for each.
#include "core/bind.h"
#include "shapes.h"

#define SHAPE(name, value) {#name, name},
const zinc::Shape zinc::shapes[] = {KERNEL_SHAPES(SHAPE){}};
