/* Loads the wheel's library behind our overrides, and refuses one that is not the one we know. */

#define _GNU_SOURCE
#include "library.h"
#include "engine.h"
#include "soft.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>

struct library lib;

static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
static int ready;

int soft_library_ready(void)
{
    return __atomic_load_n(&ready, __ATOMIC_ACQUIRE);
}

#define REFUSE(...) do { snprintf(why, size, __VA_ARGS__); return -1; } while (0)

/* Our own definitions must be found before the library's, so this extension must be global before
 * the library is loaded; and nobody may have loaded the library before us. */
static int load(const char *path, char *why, size_t size)
{
    Dl_info own;
    void *self;
    if (dlopen(path, RTLD_NOW | RTLD_NOLOAD))
        REFUSE("%s is loaded already (by `import unicorn`?); the engine must load it itself, "
               "before anybody else does", path);
    if (!dladdr((void *)soft_load, &own)
        || !(self = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL)))
        REFUSE("cannot make the engine's own definitions global: %s", dlerror());
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        REFUSE("%s", dlerror());
#define X(result, name, symbol, arguments) \
    if (!(*(void **)&lib.name = dlsym(handle, symbol))) \
        REFUSE("%s has no symbol %s; expected PyPI's unicorn 2.1.4", path, symbol);
    LIBRARY_CALLS(X)
#undef X
    return 0;
}

/* Every offset that cannot be read off the public API is compared with what the library itself
 * does in a guest of a few instructions. */
static int verify(char *why, size_t size)
{
    void *uc = NULL;
    unsigned major, minor, version = lib.uc_version(&major, &minor);
    if (version >> 8 != (2 << 16 | 1 << 8 | 4))
        REFUSE("unicorn %u.%u.%u; expected 2.1.4, whose insides the engine knows",
               version >> 24, version >> 16 & 255, version >> 8 & 255);
    if (lib.uc_open(UC_ARCH_X86, UC_MODE_64, &uc))
        REFUSE("the library cannot make an x86 engine");
    const char *wrong = soft_engine_verify(uc);
    lib.uc_close(uc);
    if (wrong)
        REFUSE("the library is not the unicorn 2.1.4 that the engine knows: %s", wrong);
    return 0;
}

int soft_load(const char *library, char *why, size_t size)
{
    int answer = 0;
    pthread_mutex_lock(&once);
    if (!ready) {
        soft_tsc_begin();
        answer = load(library, why, size);
        if (!answer)
            answer = verify(why, size);
        if (!answer)
            soft_catch_faults();
        if (!answer)
            __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&once);
    return answer;
}
