// The images of a process: in the double, none or the driver of Apple's GPUs.
#pragma once

#include <stdint.h>

extern "C" {
uint32_t _dyld_image_count(void);
const char* _dyld_get_image_name(uint32_t image_index);
}
