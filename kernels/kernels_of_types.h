// Every kernel that reads weights, for the types of a group: see quant_types.h.
#pragma once

#include "embed.metal"
#include "moe_few.metal"
#include "moe_mm.metal"
#include "moe_mv.metal"
#include "mul_few.metal"
#include "mul_few_stack.metal"
#include "mul_heads.metal"
#include "mul_mm.metal"
#include "mul_mv.metal"
#include "mul_mv_stack.metal"
