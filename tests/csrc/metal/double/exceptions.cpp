// Objective-C exceptions as C++ exceptions, which is what clang's gnustep runtime makes of them in Objective-C++.
#include <cxxabi.h>
#include <unwind.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <typeinfo>

#include "rules.h"
#include "runtime.h"

extern "C" {
void* objc_retain(void* object);
void objc_release(void* object);
_Unwind_Reason_Code __gxx_personality_v0(int, _Unwind_Action, _Unwind_Exception_Class, _Unwind_Exception*,
                                         _Unwind_Context*);
bool metal_double_is_kind(const void* object, const char* class_name);  // foundation.mm
}

namespace gnustep::libobjc {

// The type of a thrown or caught object. The name is that of its class.
class __objc_class_type_info : public std::type_info {
  public:
    explicit __objc_class_type_info(const char* name) : std::type_info(name) {}
    ~__objc_class_type_info() override;
    bool __is_pointer_p() const override { return true; }
    // object points to the id that was thrown, and is to be made what the handler sees.
    bool __do_catch(const std::type_info* thrown, void** object, unsigned) const override {
        return dynamic_cast<const __objc_class_type_info*>(thrown) && matches(*object);
    }

  protected:
    virtual bool matches(const void* object) const { return metal_double_is_kind(object, name()); }
};
__objc_class_type_info::~__objc_class_type_info() = default;

}  // namespace gnustep::libobjc

namespace metal_double {

struct AnyObject final : gnustep::libobjc::__objc_class_type_info {
    AnyObject() : __objc_class_type_info("id") {}
    bool matches(const void*) const override { return true; }
};

}  // namespace metal_double

extern "C" {

metal_double::AnyObject __objc_id_type_info;

_Unwind_Reason_Code __gnustep_objcxx_personality_v0(int version, _Unwind_Action actions, _Unwind_Exception_Class kind,
                                                    _Unwind_Exception* exception, _Unwind_Context* context) {
    return __gxx_personality_v0(version, actions, kind, exception, context);
}

[[noreturn]] void objc_exception_throw(void* object) {
    void** thrown = static_cast<void**>(abi::__cxa_allocate_exception(sizeof(void*)));
    *thrown = objc_retain(object);
    abi::__cxa_throw(thrown, &__objc_id_type_info, [](void* p) { objc_release(*static_cast<void**>(p)); });
}

}  // extern "C"

namespace metal_double {

void broken(const char* rule, const char* format, ...) {
    fprintf(stderr, "metal double: %s: ", rule);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

}  // namespace metal_double
