// The tables that differ from one extension module to another, compiled once for each.
#include "core/bind.h"
#include "quant_types.h"
#include "shapes.h"

#define SHAPE(name, value) {#name, name},
#define LIMIT(name) {#name, name},
const zinc::Shape zinc::shapes[] = {KERNEL_SHAPES(SHAPE) KERNEL_LIMITS(LIMIT){}};

#define SIZE(size) size,
#define HEAD_SIZE(kv, KV, size) size,
const zinc::SizeClasses zinc::size_classes[] = {
    {"HEAD_CLASSES", {HEAD_CLASSES_OF(HEAD_SIZE, , )}},
    {"LATENT_CLASSES", {LATENT_CLASSES_OF(HEAD_SIZE, , )}},
    {"SSM_CLASSES", {SSM_CLASSES(SIZE)}},
    {},
};

#define NAME(name, type) name,
const char* const zinc::tensor_types[] = {ALL_TENSOR_TYPES(NAME) nullptr};
const char* const zinc::expert_types[] = {ALL_TENSOR_TYPES(NAME) nullptr};
