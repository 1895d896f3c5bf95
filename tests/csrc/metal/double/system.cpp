// What the Metal backend asks of macOS itself.
#include <mach-o/dyld.h>
#include <pthread/qos.h>

#include "conditions.h"
#include "execute.h"
#include "rules.h"

using namespace metal_double;

struct pthread_override_s {
    pthread_t thread;
};

extern "C" {

pthread_override_t pthread_override_qos_class_start_np(pthread_t thread, qos_class_t qos_class, int priority) {
    if (qos_class != QOS_CLASS_USER_INITIATED || priority > 0) broken("quality", "class %d, %d", qos_class, priority);
    count(&Totals::efforts);
    count(&Totals::n_efforts);
    return new pthread_override_s{thread};
}

int pthread_override_qos_class_end_np(pthread_override_t override_) {
    if (!override_ || !pthread_equal(override_->thread, pthread_self()))
        broken("quality", "an override ends on another thread than it began");
    delete override_;
    count(&Totals::efforts, -1);
    return 0;
}

uint32_t _dyld_image_count() { return condition("driver") == "loaded" ? 1 : 0; }
const char* _dyld_get_image_name(uint32_t) { return "/System/Library/Extensions/AGXMetalG14X.bundle/AGXMetalG14X"; }

}  // extern "C"
