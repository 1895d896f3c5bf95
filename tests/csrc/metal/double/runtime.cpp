// The part of an Objective-C runtime that clang's code for -fobjc-runtime=gnustep-2.0 needs here: classes, messages,
// reference counts and autorelease pools. Layouts are those that clang emits (clang/lib/CodeGen/CGObjCGNU.cpp). An
// object that is gone is remembered, so that a message to it, or one release too many, is named and not undefined.
#include "runtime.h"

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "blocks.h"
#include "rules.h"

namespace {

using metal_double::broken;

// ---- what the compiler emits

struct Selector {
    const char* name;
    const char* types;
};
using Method = void (*)();
struct MethodEntry {
    Method method;
    Selector* selector;
    const char* types;
};
struct MethodList {
    MethodList* next;
    int count;
    size_t entry_bytes;
    MethodEntry entries[];
};
struct Ivar {
    const char* name;
    const char* type;
    int* offset;  // from the end of the superclass, until the class is loaded
    uint32_t bytes, flags;
};
struct IvarList {
    int count;
    size_t entry_bytes;
    Ivar entries[];
};
// What a lookup returns; callers read `method`.
struct Slot {
    const void* owner;
    const void* cached_for;
    const char* types;
    int version;
    Method method;
};
using Methods = std::unordered_map<const char*, Slot>;  // selector names are unique, see intern()

struct Class {
    Class* isa;
    Class* superclass;
    const char* name;
    long version;
    unsigned long info;
    long instance_bytes;  // negative: without the superclass
    IvarList* ivars;
    MethodList* methods;
    Methods* table;  // ours: with the superclass's
    Method construct, destruct;
    Class *subclasses, *sibling;
    void *protocols, *extra;
    long abi_version;
    void* properties;

    bool is_meta() const { return info & 1; }
};
struct Module {  // what __objc_load is given: the start and end of each list
    uint64_t version;
    Selector *selectors, *selectors_end;
    Class **classes, **classes_end;
    // and more that nobody here needs
};
struct Super {
    void* receiver;
    Class* superclass;
};

// ---- classes

std::mutex& names_mutex() {
    static std::mutex mutex;
    return mutex;
}

const char* intern(const char* name) {
    static std::unordered_set<std::string> names;
    const std::lock_guard lock(names_mutex());
    return names.emplace(name).first->c_str();
}

void load_class(Class* c) {
    if (c->table) return;
    if (c->superclass) load_class(c->superclass);
    c->table = c->superclass ? new Methods(*c->superclass->table) : new Methods;
    for (const MethodList* list = c->methods; list; list = list->next)
        for (int i = 0; i < list->count; i++) {
            const MethodEntry& m = list->entries[i];
            (*c->table)[m.selector->name] = {c, nullptr, m.types, 0, m.method};
        }
    if (c->is_meta()) return;
    long before = c->superclass ? c->superclass->instance_bytes : 0;
    before = (before + 7) / 8 * 8;  // no instance variable here asks for more
    for (int i = 0; c->ivars && i < c->ivars->count; i++) *c->ivars->entries[i].offset += int(before);
    if (c->instance_bytes <= 0) c->instance_bytes = before - c->instance_bytes;
}

// What a class understands is what its superclass does, and in the end what every object does.
void link_metaclass(Class* c) { c->isa->superclass = c->superclass ? c->superclass->isa : c; }

const Slot* find(const Class* c, const char* selector) {
    const auto found = c->table->find(selector);
    return found == c->table->end() ? nullptr : &found->second;
}

// ---- objects

constexpr uint64_t LIVE = 0x6c697665206f626a, GOING = 0x676f696e67206f62, DEAD = 0x64656164206f626a;
// Before every object. Objects that are gone keep theirs until many others are gone too.
struct alignas(16) Header {
    uint64_t state;
    std::atomic<long> count;
    const Class* of;
};
constexpr size_t REMEMBERED = 1 << 16;

struct Objects {
    std::mutex mutex;
    std::unordered_map<const Class*, long> live;
    std::deque<Header*> gone;
};
Objects& objects() {
    static Objects* all = new Objects;  // never destroyed: objects go as late as the process
    return *all;
}

Header* header(const void* object) { return reinterpret_cast<Header*>(const_cast<void*>(object)) - 1; }
Class* class_of(const void* object) { return *static_cast<Class* const*>(object); }
// Short string literals are not objects in memory: their characters are in the pointer.
bool is_tagged(const void* object) { return reinterpret_cast<uintptr_t>(object) & 7; }

extern "C" Class constant_string_class __asm__("._OBJC_CLASS_NSConstantString");
extern "C" Class tiny_string_class __asm__("._OBJC_CLASS_TinyString");

enum class Kind { none, immortal, block, object };
Kind kind_of(const void* object) {
    if (!object) return Kind::none;
    if (is_tagged(object)) return Kind::immortal;
    const Class* c = class_of(object);
    if (metal_double::is_block_class(c)) return Kind::block;
    if (!c) broken("not-an-object", "a message or retain for %p, which is no object", object);
    if (c == &constant_string_class || c->is_meta()) return Kind::immortal;
    return Kind::object;
}

// Neither Metal nor its objects go along with a fork.
pid_t opener = 0;
void check_process(const Header* h, const char* what) {
    if (getpid() != opener) broken("fork", "%s of a %s in a child of the process that loaded it", what, h->of->name);
}

Header* checked(const void* object, const char* what) {
    Header* h = header(object);
    if (h->state == DEAD) broken("use-after-release", "%s of a %s that was deallocated", what, h->of->name);
    if (h->state != LIVE && h->state != GOING) broken("not-an-object", "%s of %p, which is no object", what, object);
    return h;
}

void destroy_ivars(const Class* c, void* object) {
    static const char* const selector = intern(".cxx_destruct");
    for (; c; c = c->superclass) {
        const Slot* own = find(c, selector);
        if (own && own->owner == c) reinterpret_cast<void (*)(void*, Selector*)>(own->method)(object, nullptr);
    }
}

void construct_ivars(const Class* c, void* object) {
    static const char* const selector = intern(".cxx_construct");
    if (c->superclass) construct_ivars(c->superclass, object);
    const Slot* own = find(c, selector);
    if (own && own->owner == c) reinterpret_cast<void* (*)(void*, Selector*)>(own->method)(object, nullptr);
}

void dispose(void* object, Header* h) {
    static Selector dealloc{intern("dealloc"), ""};
    check_process(h, "dealloc");
    h->state = GOING;
    reinterpret_cast<void (*)(void*, Selector*)>(find(h->of, dealloc.name)->method)(object, &dealloc);
    destroy_ivars(h->of, object);
    Objects& all = objects();
    const std::lock_guard lock(all.mutex);
    all.live[h->of]--;
    h->state = DEAD;
    all.gone.push_back(h);
    if (all.gone.size() <= REMEMBERED) return;
    free(all.gone.front());
    all.gone.pop_front();
}

// ---- autorelease pools: a stack of objects per thread, and where in it each pool begins

struct Pools {
    std::vector<void*> objects;
    std::vector<size_t> begins;
};
thread_local Pools pools;

}  // namespace

extern "C" {

void __objc_load(Module* module) {
    opener = getpid();
    for (Selector* s = module->selectors; s < module->selectors_end; s++)
        if (s->name) s->name = intern(s->name);
    for (Class** c = module->classes; c < module->classes_end; c++)
        if (*c) link_metaclass(*c);
    for (Class** c = module->classes; c < module->classes_end; c++)
        if (*c) {
            load_class((*c)->isa);
            load_class(*c);
        }
}

const Slot* objc_msg_lookup_sender(void** receiver, Selector* selector, void*) {
    static const Slot nothing = {nullptr, nullptr, "", 0, reinterpret_cast<Method>(+[]() -> void* { return nullptr; })};
    if (!*receiver) return &nothing;
    const Class* c = is_tagged(*receiver) ? &tiny_string_class : class_of(*receiver);
    if (kind_of(*receiver) == Kind::object) check_process(checked(*receiver, selector->name), selector->name);
    if (const Slot* slot = find(c, selector->name)) return slot;
    broken("unrecognized-selector", "%c[%s %s]", c->is_meta() ? '+' : '-', c->name, selector->name);
}

Method objc_msg_lookup_super(Super* super, Selector* selector) {
    if (const Slot* slot = find(super->superclass, selector->name)) return slot->method;
    broken("unrecognized-selector", "[super %s] of %s", selector->name, super->superclass->name);
}

void* metal_double_new(const void* object_class) {
    const auto* c = static_cast<const Class*>(object_class);
    void* memory = calloc(1, sizeof(Header) + size_t(c->instance_bytes));
    if (!memory) throw std::bad_alloc();
    Header* h = new (memory) Header{LIVE, 1, c};
    void* object = h + 1;
    *static_cast<const Class**>(object) = c;
    construct_ivars(c, object);
    Objects& all = objects();
    const std::lock_guard lock(all.mutex);
    all.live[c]++;
    return object;
}

bool metal_double_is_live(const void* object) { return header(object)->state == LIVE; }
const char* metal_double_class_name(const void* object) { return class_of(object)->name; }

void* objc_retain(void* object) {
    const Kind kind = kind_of(object);
    if (kind == Kind::block) return _Block_copy(object);
    if (kind == Kind::object) checked(object, "retain")->count++;
    return object;
}

void objc_release(void* object) {
    const Kind kind = kind_of(object);
    if (kind == Kind::block) return _Block_release(object);
    if (kind != Kind::object) return;
    Header* h = checked(object, "release");
    if (--h->count == 0 && h->state == LIVE) dispose(object, h);  // dealloc itself may retain and release
}

void* objc_retainBlock(void* block) { return block ? _Block_copy(block) : nullptr; }

void objc_storeStrong(void** place, void* object) {
    objc_retain(object);
    void* before = *place;
    *place = object;
    objc_release(before);
}

void* objc_autoreleasePoolPush() {
    pools.begins.push_back(pools.objects.size());
    return reinterpret_cast<void*>(pools.begins.size());
}

void objc_autoreleasePoolPop(void* pool) {
    const auto number = reinterpret_cast<size_t>(pool);
    if (number == 0 || number > pools.begins.size()) broken("autorelease-pool", "a pool is popped that is not there");
    const size_t begin = pools.begins[number - 1];
    while (pools.objects.size() > begin) {  // what goes may autorelease others
        void* object = pools.objects.back();
        pools.objects.pop_back();
        objc_release(object);
    }
    pools.begins.resize(number - 1);
}

void* objc_autorelease(void* object) {
    const Kind kind = kind_of(object);
    if (kind == Kind::none || kind == Kind::immortal) return object;
    if (kind == Kind::object) checked(object, "autorelease");
    if (pools.begins.empty())
        broken("autorelease-pool", "a %s is autoreleased with no pool in place: it leaks",
               kind == Kind::object ? class_of(object)->name : "block");
    pools.objects.push_back(object);
    return object;
}

void* objc_retainAutorelease(void* object) { return objc_autorelease(objc_retain(object)); }
void* objc_autoreleaseReturnValue(void* object) { return objc_autorelease(object); }
void* objc_retainAutoreleaseReturnValue(void* object) { return objc_retainAutorelease(object); }
void* objc_retainAutoreleasedReturnValue(void* object) { return objc_retain(object); }
void* objc_unsafeClaimAutoreleasedReturnValue(void* object) { return object; }

// ---- properties

namespace {
std::mutex property_mutex;
void** field(void* object, ptrdiff_t offset) { return reinterpret_cast<void**>(static_cast<char*>(object) + offset); }
}  // namespace

void* objc_getProperty(void* object, Selector*, ptrdiff_t offset, bool) {
    const std::lock_guard lock(property_mutex);
    return objc_retainAutorelease(*field(object, offset));
}

// Strings and arrays here do not change: a copy is the object itself.
void objc_setProperty_atomic(void* object, Selector*, void* value, ptrdiff_t offset) {
    objc_retain(value);
    void* before;
    {
        const std::lock_guard lock(property_mutex);
        before = *field(object, offset);
        *field(object, offset) = value;
    }
    objc_release(before);
}
void objc_setProperty_atomic_copy(void* object, Selector* selector, void* value, ptrdiff_t offset) {
    objc_setProperty_atomic(object, selector, value, offset);
}
void objc_setProperty_nonatomic(void* object, Selector* selector, void* value, ptrdiff_t offset) {
    objc_setProperty_atomic(object, selector, value, offset);
}
void objc_setProperty_nonatomic_copy(void* object, Selector* selector, void* value, ptrdiff_t offset) {
    objc_setProperty_atomic(object, selector, value, offset);
}

void objc_enumerationMutation(void* object) {
    broken("enumeration", "a %s changed while it was enumerated", class_of(object)->name);
}

}  // extern "C"

namespace metal_double {

std::map<std::string, long> live_objects() {
    Objects& all = objects();
    const std::lock_guard lock(all.mutex);
    std::map<std::string, long> found;
    for (const auto& [c, n] : all.live)
        if (n) found[c->name] = n;
    if (const long n = live_blocks()) found["block"] = n;
    return found;
}

}  // namespace metal_double
