// Overrides of a thread's quality of service, which the double counts.
#pragma once

#include <pthread.h>

typedef enum { QOS_CLASS_USER_INITIATED = 0x19, QOS_CLASS_DEFAULT = 0x15 } qos_class_t;
typedef struct pthread_override_s* pthread_override_t;

extern "C" {
pthread_override_t pthread_override_qos_class_start_np(pthread_t thread, qos_class_t qos_class, int relative_priority);
int pthread_override_qos_class_end_np(pthread_override_t override_);
}
