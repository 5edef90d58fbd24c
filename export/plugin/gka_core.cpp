#include "gka_core.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "gka_kernels.inc"

namespace gka {
namespace {

constexpr std::size_t pointer_alignment = 16; // what kernels are compiled for
constexpr std::size_t temporary_alignment = 256; // as tensors have it
constexpr int portable_below = 9; // from this major version on, code is for one GPU only

std::string join(const Span<Tensor>& tensors)
{
    std::string names;
    for (const Tensor& tensor : tensors)
        names += (names.empty() ? "" : ",") + std::string(tensor.name);
    return names;
}

std::string describe(const Attributes& a)
{
    std::string text;
    if (a.num_heads)
        text += " num_heads=" + std::to_string(a.num_heads);
    if (a.num_iter)
        text += " scale=" + std::to_string(a.scale) + " ridge_ratio=" + std::to_string(a.ridge_ratio)
            + " num_iter=" + std::to_string(a.num_iter);
    if (a.chunk_size)
        text += " chunk_size=" + std::to_string(a.chunk_size);
    return text;
}

bool operator==(const Attributes& a, const Attributes& b)
{
    return a.num_heads == b.num_heads && a.chunk_size == b.chunk_size && a.scale == b.scale && a.ridge_ratio == b.ridge_ratio
        && a.num_iter == b.num_iter;
}

const char* name_of(int type)
{
    static const char* const names[] = {"float32", "float16", "bfloat16"};
    return type == unknown ? "?" : names[type];
}

struct Integers {
    using Value = std::int64_t;
    const Sizes& sizes;

    Value constant(std::int64_t value) const { return value; }
    Value symbol(int which) const { return which == 0 ? sizes.B : sizes.T; }
    Value operation(Term::Kind kind, Value a, Value b) const
    {
        switch (kind) {
        case Term::add: return a + b;
        case Term::mul: return a * b;
        case Term::floordiv: return floordiv(a, b);
        case Term::mod: return a - b * floordiv(a, b);
        case Term::max: return std::max(a, b);
        default: return std::min(a, b);
        }
    }
    static Value floordiv(Value a, Value b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
};

const Tensor& tensor_at(const Variant& variant, int place)
{
    return place < variant.inputs.count ? variant.inputs[place] : variant.outputs[place - variant.inputs.count];
}

bool is_constant(const Size& size) { return size.count == 1 && size[0].kind == Term::constant; }
bool is_symbol(const Size& size) { return size.count == 1 && size[0].kind == Term::symbol; }

std::size_t aligned(std::size_t bytes) { return (bytes + temporary_alignment - 1) / temporary_alignment * temporary_alignment; }

// The part of the CUDA driver that launches kernels. Loaded when first used, so that the library loads on a machine without one.
struct Driver {
    using Result = int;
    Result (*CtxGetCurrent)(void**);
    Result (*CtxGetDevice)(int*);
    Result (*DeviceGetAttribute)(int*, int, int);
    Result (*ModuleLoadData)(void**, const void*);
    Result (*ModuleGetFunction)(void**, void*, const char*);
    Result (*FuncSetAttribute)(void*, int, int);
    Result (*LaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

    Driver()
    {
        library_ = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library_)
            throw Error("CUDA: expected an NVIDIA driver, got a machine without libcuda.so.1");
        find(CtxGetCurrent, "cuCtxGetCurrent");
        find(CtxGetDevice, "cuCtxGetDevice");
        find(DeviceGetAttribute, "cuDeviceGetAttribute");
        find(ModuleLoadData, "cuModuleLoadData");
        find(ModuleGetFunction, "cuModuleGetFunction");
        find(FuncSetAttribute, "cuFuncSetAttribute");
        find(LaunchKernel, "cuLaunchKernel");
    }

    static const Driver& get()
    {
        static const Driver driver;
        return driver;
    }

private:
    template <class Function> void find(Function& function, const char* name)
    {
        function = reinterpret_cast<Function>(dlsym(library_, name));
        if (!function)
            throw Error(std::string("CUDA: expected a driver with ") + name + ", got one without");
    }

    void* library_;
};

void check(Driver::Result result, const std::string& what)
{
    if (result)
        throw Error(what + " failed with CUDA error " + std::to_string(result));
}

struct Loaded {
    const Target* target;
    std::vector<void*> functions; // one per launch
};

// Code that a GPU of this compute capability runs: its own; machine code for the greatest minor version below it of the same major
// version; else text for the greatest one below it, which the driver compiles. The last two where code is portable.
const Target* choose(const Variant& variant, int major, int minor, bool& ptx)
{
    const Target *older = nullptr, *text = nullptr;
    const std::pair<int, int> own(major, minor);
    for (const Target& target : variant.targets) {
        const std::pair<int, int> version(target.major, target.minor);
        if (version == own) {
            ptx = false;
            return &target;
        }
        if (target.major >= portable_below || version > own)
            continue;
        if (target.major == major && (!older || version > std::make_pair(older->major, older->minor)))
            older = &target;
        if (!text || version > std::make_pair(text->major, text->minor))
            text = &target;
    }
    ptx = !older;
    return older ? older : text;
}

const Loaded& load(const Variant& variant)
{
    static std::mutex mutex;
    static std::map<std::pair<void*, const Variant*>, Loaded> cache; // code belongs to a context
    const Driver& driver = Driver::get();
    void* context = nullptr;
    check(driver.CtxGetCurrent(&context), "CUDA: cuCtxGetCurrent");
    if (!context)
        throw Error("CUDA: expected a current context on this thread, got none");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_pair(context, &variant);
    const auto found = cache.find(key);
    if (found != cache.end())
        return found->second;
    int device = 0, major = 0, minor = 0;
    check(driver.CtxGetDevice(&device), "CUDA: cuCtxGetDevice");
    check(driver.DeviceGetAttribute(&major, 75, device), "CUDA: cuDeviceGetAttribute");
    check(driver.DeviceGetAttribute(&minor, 76, device), "CUDA: cuDeviceGetAttribute");
    bool ptx = false;
    Loaded loaded{choose(variant, major, minor, ptx), {}};
    if (!loaded.target) {
        std::string known;
        for (const Target& target : variant.targets)
            known += (known.empty() ? "" : ", ") + std::to_string(target.major) + "." + std::to_string(target.minor);
        throw Error(std::string("gka ") + variant.op
            + ": expected a GPU of a compute capability that the kernel bundle was built for, " + known + ", got one of "
            + std::to_string(major) + "." + std::to_string(minor) + ": build the bundle for that too");
    }
    for (const Launch& launch : loaded.target->launches) {
        void *module = nullptr, *function = nullptr;
        const std::string name = std::string("gka ") + variant.op + ": loading " + launch.kernel;
        check(driver.ModuleLoadData(&module, ptx ? launch.ptx : launch.cubin), name);
        check(driver.ModuleGetFunction(&function, module, launch.kernel), name);
        constexpr int most_dynamic_shared_bytes = 8;
        check(driver.FuncSetAttribute(function, most_dynamic_shared_bytes, static_cast<int>(launch.shared_bytes)), name);
        loaded.functions.push_back(function);
    }
    return cache.emplace(key, std::move(loaded)).first->second;
}

} // namespace

std::int64_t evaluate(const Size& size, const Sizes& sizes) { return evaluate(size, Integers{sizes}); }

Node::Node(const std::string& op, const Attributes& attributes, const std::string& inputs)
    : op_(op)
    , inputs_(inputs)
    , attributes_(attributes)
{
    std::string others;
    for (int i = 0; i < variant_count; ++i) {
        const Variant& variant = variants[i];
        if (op != variant.op)
            continue;
        if (variant.attributes == attributes && join(variant.inputs) == inputs)
            candidates_.push_back(&variant);
        const std::string other = "inputs=" + join(variant.inputs) + describe(variant.attributes);
        if (others.find(other) == std::string::npos)
            others += (others.empty() ? "" : "; ") + other;
    }
    if (candidates_.empty())
        throw Error("gka " + op + ": expected a node that the kernel bundle was built for ("
            + (others.empty() ? "it has none of this op" : others) + "), got inputs=" + inputs + describe(attributes));
}

const Variant* Node::find(const Given* tensors, int count) const
{
    for (const Variant* variant : candidates_) {
        bool agrees = true;
        for (int i = 0; i < count && agrees; ++i) {
            const Tensor& tensor = tensor_at(*variant, i);
            agrees = (tensors[i].type == unknown || tensors[i].type == static_cast<int>(tensor.type))
                && (tensors[i].rank == unknown || tensors[i].rank == tensor.rank);
            for (int d = 0; d < tensor.rank && agrees && tensors[i].rank != unknown; ++d)
                agrees = tensors[i].dims[d] < 0 || !is_constant(tensor.shape[d]) || tensors[i].dims[d] == tensor.shape[d][0].value;
        }
        if (agrees)
            return variant;
    }
    return nullptr;
}

const Variant& Node::get(const Given* tensors, int count) const
{
    if (const Variant* variant = find(tensors, count))
        return *variant;
    std::string got;
    for (int i = 0; i < count; ++i) {
        got += std::string(i ? ", " : "") + tensor_at(*candidates_.front(), i).name + " " + name_of(tensors[i].type) + " [";
        for (int d = 0; d < tensors[i].rank; ++d)
            got += (d ? "," : "") + std::to_string(tensors[i].dims[d]);
        got += "]";
    }
    throw Error("gka " + op_ + ": expected types, head counts and widths that the kernel bundle was built for, got " + got);
}

Sizes bind(const Variant& variant, const Given* inputs)
{
    Sizes sizes{-1, -1};
    for (int i = 0; i < variant.inputs.count; ++i)
        for (int d = 0; d < variant.inputs[i].rank; ++d) {
            const Size& size = variant.inputs[i].shape[d];
            std::int64_t& known = is_symbol(size) && size[0].value == 1 ? sizes.T : sizes.B;
            if (is_symbol(size) && known < 0)
                known = inputs[i].dims[d];
        }
    for (int i = 0; i < variant.inputs.count; ++i)
        for (int d = 0; d < variant.inputs[i].rank; ++d) {
            const std::int64_t expected = evaluate(variant.inputs[i].shape[d], sizes), got = inputs[i].dims[d];
            if (got != expected)
                throw Error(std::string("gka ") + variant.op + ": expected " + variant.inputs[i].name + " to have size "
                    + std::to_string(expected) + " in dimension " + std::to_string(d) + ", got " + std::to_string(got));
        }
    return sizes;
}

std::size_t workspace_bytes(const Variant& variant, const Sizes& sizes)
{
    std::size_t most = 0;
    for (const Target& target : variant.targets) {
        std::size_t bytes = 0;
        for (const Size& size : target.temporaries)
            bytes += aligned(static_cast<std::size_t>(evaluate(size, sizes)));
        most = std::max(most, bytes);
    }
    return most;
}

void launch(
    const Variant& variant, const Sizes& sizes, const void* const* inputs, void* const* outputs, void* workspace, void* stream)
{
    const Loaded& loaded = load(variant);
    const std::string name = std::string("gka ") + variant.op;
    std::vector<std::uint64_t> places;
    for (int i = 0; i < variant.inputs.count; ++i)
        places.push_back(reinterpret_cast<std::uint64_t>(inputs[i]));
    for (int i = 0; i < variant.outputs.count; ++i)
        places.push_back(reinterpret_cast<std::uint64_t>(outputs[i]));
    std::uint64_t free = reinterpret_cast<std::uint64_t>(workspace);
    for (const Size& size : loaded.target->temporaries) {
        places.push_back(free);
        free += aligned(static_cast<std::size_t>(evaluate(size, sizes)));
    }
    for (std::size_t i = 0; i < places.size(); ++i)
        if (places[i] % pointer_alignment)
            throw Error(name + ": expected tensors at multiples of " + std::to_string(pointer_alignment)
                + " bytes, got one that is not (" + std::to_string(i) + " of inputs, outputs, workspace)");
    for (int i = 0; i < loaded.target->launches.count; ++i) {
        const Launch& launch = loaded.target->launches[i];
        std::int64_t grid[3];
        for (int axis = 0; axis < 3; ++axis) {
            grid[axis] = evaluate(launch.grid[axis], sizes);
            if (grid[axis] > (axis ? 65535 : 2147483647))
                throw Error(name + ": expected a smaller batch or length, got " + std::to_string(grid[axis]) + " blocks along axis "
                    + std::to_string(axis) + " of the grid");
        }
        if (grid[0] * grid[1] * grid[2] == 0)
            continue;
        std::vector<std::uint64_t> values(launch.arguments.count); // a 32-bit integer is the first half of its word
        std::vector<void*> parameters;
        for (int a = 0; a < launch.arguments.count; ++a) {
            const Argument& argument = launch.arguments[a];
            if (argument.kind == Argument::pointer)
                values[a] = places[argument.place] + static_cast<std::uint64_t>(evaluate(argument.value, sizes));
            else if (argument.kind != Argument::null) {
                const std::int64_t value = evaluate(argument.value, sizes);
                if (argument.kind == Argument::integer32 && value != static_cast<std::int32_t>(value))
                    throw Error(name + ": expected sizes below 2^31, got " + std::to_string(value));
                values[a] = static_cast<std::uint64_t>(value);
            }
            parameters.push_back(&values[a]);
        }
        check(Driver::get().LaunchKernel(loaded.functions[i], static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
                  static_cast<unsigned>(grid[2]), launch.threads, 1, 1, launch.shared_bytes, stream, parameters.data(), nullptr),
            name + ": launching " + launch.kernel);
    }
}

} // namespace gka
