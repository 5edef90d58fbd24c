/* A CUDA driver that launches nothing and prints what it was asked to: libcuda.so.1 of tests/test_plugin.py.
 *
 * FAKE_CAPABILITY  "8.9"
 * FAKE_KERNELS     "name:bytes of code:parameters,…", a parameter being p (pointer), i (32 bits) or l (64 bits)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct function {
    char name[256];
    char kinds[256];
};

/* Of the kernels of that name the first not loaded yet, else the last: (bytes of code, kinds of parameters), 0 if there is none. */
static int entry(const char* name, long* bytes, char* kinds)
{
    static char loaded[1 << 16]; /* by its place in FAKE_KERNELS */
    char wanted[256];
    const char* all = getenv("FAKE_KERNELS");
    int found = 0;
    snprintf(wanted, sizeof wanted, "%s:", name);
    for (const char* at = all; (at = strstr(at, wanted)); ++at) {
        if (at != all && at[-1] != ',')
            continue;
        found = sscanf(at + strlen(wanted), "%ld:%255[a-z]", bytes, kinds) == 2;
        if (!loaded[at - all]) {
            loaded[at - all] = 1;
            break;
        }
    }
    return found;
}

int cuCtxGetCurrent(void** context)
{
    *context = getenv("FAKE_NO_CONTEXT") ? NULL : (void*)1;
    return 0;
}
int cuCtxGetDevice(int* device)
{
    *device = 0;
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    int major, minor;
    (void)device;
    sscanf(getenv("FAKE_CAPABILITY"), "%d.%d", &major, &minor);
    *value = attribute == 75 ? major : minor;
    return 0;
}
int cuModuleLoadData(void** module, const void* image)
{
    *module = (void*)image;
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name)
{
    struct function* made = calloc(1, sizeof *made);
    long bytes;
    if (!entry(name, &bytes, made->kinds))
        return 500;
    snprintf(made->name, sizeof made->name, "%s", name);
    unsigned long long hash = 14695981039346656037ull;
    const unsigned char* image = module;
    for (long i = 0; i < bytes; ++i)
        hash = (hash ^ image[i]) * 1099511628211ull;
    printf("load %s %llu\n", name, hash);
    *function = made;
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value)
{
    printf("attribute %s %d %d\n", ((struct function*)function)->name, attribute, value);
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void* stream, void** parameters, void** extra)
{
    const struct function* made = function;
    printf("launch %s %u %u %u %u %u %u %u %lld %d", made->name, gx, gy, gz, bx, by, bz, shared, (long long)stream,
        extra == NULL);
    for (int i = 0; made->kinds[i]; ++i)
        printf(" %lld", made->kinds[i] == 'i' ? (long long)*(int*)parameters[i] : *(long long*)parameters[i]);
    printf("\n");
    return 0;
}
