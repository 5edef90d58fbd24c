/* A CUDA driver that launches nothing and prints what it was asked to: libcuda.so.1 of tests/test_plugin.py.
 *
 * FAKE_CAPABILITY  "8.9"
 * FAKE_KERNELS     "name:bytes of code:parameters,…", a parameter being p (pointer), i (32 bits) or l (64 bits)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char* entry(const char* name)
{
    static char found[4096];
    char wanted[256];
    snprintf(wanted, sizeof wanted, "%s:", name);
    const char* all = getenv("FAKE_KERNELS");
    const char* at = strstr(all, wanted);
    if (!at)
        return NULL;
    snprintf(found, sizeof found, "%s", at + strlen(wanted));
    if (strchr(found, ','))
        *strchr(found, ',') = 0;
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
    const char* known = entry(name);
    if (!known)
        return 500;
    unsigned long long hash = 14695981039346656037ull;
    const unsigned char* image = module;
    for (long i = 0; i < atol(known); ++i)
        hash = (hash ^ image[i]) * 1099511628211ull;
    printf("load %s %llu\n", name, hash);
    *function = strdup(name);
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value)
{
    printf("attribute %s %d %d\n", (char*)function, attribute, value);
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void* stream, void** parameters, void** extra)
{
    printf("launch %s %u %u %u %u %u %u %u %lld %d", (char*)function, gx, gy, gz, bx, by, bz, shared, (long long)stream,
        extra == NULL);
    const char* kinds = strchr(entry(function), ':') + 1;
    for (int i = 0; kinds[i]; ++i)
        printf(" %lld", kinds[i] == 'i' ? (long long)*(int*)parameters[i] : *(long long*)parameters[i]);
    printf("\n");
    return 0;
}
