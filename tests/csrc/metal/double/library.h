// Kernel libraries and pipelines, for the device.
#pragma once

#import <Metal/Metal.h>

#include <string>
#include <vector>

#include "objects.h"

namespace metal_double {

// The names of the kernels in a source, as this version of the language has it, or in a file that plays a metallib;
// `failure` says why there are none.
std::vector<std::string> compile(const std::string& source, MTLLanguageVersion language, std::string& failure);
std::vector<std::string> load(const std::string& path, std::string& failure);

DoublePipeline* pipeline(DoubleDevice* device, MTLComputePipelineDescriptor* descriptor,
                         MTLComputePipelineReflection* __strong* reflection, std::string& failure);

}  // namespace metal_double
