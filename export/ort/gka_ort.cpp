// The GKA ops as custom ops of ONNX Runtime's CUDA provider, over the kernels of one bundle: `gka` nodes as to_onnx(form="fused")
// writes them, or "plugin". A runtime that has not loaded this library runs the functions in the file instead.
#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <exception>
#include <string>
#include <vector>

#include "../plugin/gka_core.h"

#ifndef GKA_ORT_PROVIDER // tests have no other than the CPU's
#define GKA_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace {

constexpr std::uint32_t api_version = 17; // the first that infers shapes, ONNX Runtime 1.17
constexpr const char* domain = "gka";
constexpr const char* const op_names[] = {"chunk_state", "chunk_output", "step"};
constexpr int output_counts[] = {5, 4, 3};
constexpr int most_kinds = 16; // names of an op in one file: step, step_1, ... where its nodes differ

const OrtApi* api = nullptr;

// --- what ONNX Runtime says and wants to hear -------------------------------------------------------------------------------

void check(OrtStatus* status)
{
    if (!status)
        return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw gka::Error(message);
}

template <class Body> OrtStatus* guarded(Body body) noexcept
{
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return api->CreateStatus(ORT_FAIL, error.what());
    }
}

// A description of a tensor, released with this.
struct Info {
    OrtTensorTypeAndShapeInfo* get = nullptr;

    Info() { check(api->CreateTensorTypeAndShapeInfo(&get)); }
    explicit Info(const OrtValue* value) { check(api->GetTensorTypeAndShape(value, &get)); }
    Info(const Info&) = delete;
    Info& operator=(const Info&) = delete;
    ~Info() { api->ReleaseTensorTypeAndShapeInfo(get); }
};

int type_of(ONNXTensorElementDataType type)
{
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return static_cast<int>(gka::Type::float32);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return static_cast<int>(gka::Type::float16);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return static_cast<int>(gka::Type::bfloat16);
    default: return -2; // no variant has it
    }
}

ONNXTensorElementDataType type_of(gka::Type type)
{
    switch (type) {
    case gka::Type::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case gka::Type::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    }
}

// A rank that no variant has stays as it is; of its dimensions, those that fit.
gka::Given given(const OrtTensorTypeAndShapeInfo* info)
{
    gka::Given given;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t rank = 0;
    std::vector<std::int64_t> dims;
    check(api->GetTensorElementType(info, &type));
    check(api->GetDimensionsCount(info, &rank));
    dims.resize(rank);
    check(api->GetDimensions(info, dims.data(), rank));
    given.type = type_of(type);
    given.rank = static_cast<int>(rank);
    for (std::size_t d = 0; d < rank && d < sizeof(given.dims) / sizeof(given.dims[0]); ++d)
        given.dims[d] = dims[d];
    return given;
}

// --- a node -----------------------------------------------------------------------------------------------------------------

// The attributes of a node, from what gives each by its name: void(const char*, T&).
template <class Read> gka::Node read_node(int op, Read read)
{
    gka::Attributes attributes{};
    std::int64_t integer = 0;
    std::string inputs;
    read("inputs", inputs);
    if (op == 0) {
        read("num_heads", integer);
        attributes.num_heads = static_cast<int>(integer);
    } else {
        read("scale", attributes.scale);
        read("ridge_ratio", attributes.ridge_ratio);
        read("num_iter", integer);
        attributes.num_iter = static_cast<int>(integer);
    }
    if (op != 2) {
        read("chunk_size", integer);
        attributes.chunk_size = static_cast<int>(integer);
    }
    return gka::Node(op_names[op], attributes, inputs);
}

struct KernelAttributes {
    const OrtKernelInfo* info;

    void operator()(const char* name, std::int64_t& value) const { check(api->KernelInfoGetAttribute_int64(info, name, &value)); }
    void operator()(const char* name, float& value) const { check(api->KernelInfoGetAttribute_float(info, name, &value)); }
    void operator()(const char* name, std::string& value) const
    {
        std::size_t size = 0;
        check(api->KernelInfoGetAttribute_string(info, name, nullptr, &size));
        value.resize(size);
        check(api->KernelInfoGetAttribute_string(info, name, &value[0], &size));
        value.resize(std::strlen(value.c_str()));
    }
};

struct ShapeAttributes {
    const OrtShapeInferContext* context;

    const OrtOpAttr* find(const char* name) const
    {
        const OrtOpAttr* attribute = nullptr;
        check(api->ShapeInferContext_GetAttribute(context, name, &attribute));
        return attribute;
    }
    void operator()(const char* name, std::int64_t& value) const
    {
        std::size_t size = 0;
        check(api->ReadOpAttr(find(name), ORT_OP_ATTR_INT, &value, sizeof(value), &size));
    }
    void operator()(const char* name, float& value) const
    {
        std::size_t size = 0;
        check(api->ReadOpAttr(find(name), ORT_OP_ATTR_FLOAT, &value, sizeof(value), &size));
    }
    void operator()(const char* name, std::string& value) const
    {
        const OrtOpAttr* const attribute = find(name);
        std::size_t size = 0;
        if (OrtStatus* const status = api->ReadOpAttr(attribute, ORT_OP_ATTR_STRING, nullptr, 0, &size))
            api->ReleaseStatus(status); // it says the size
        value.resize(size);
        check(api->ReadOpAttr(attribute, ORT_OP_ATTR_STRING, &value[0], size, &size));
        value.resize(std::strlen(value.c_str()));
    }
};

// A size that may be unknown, with a name that says what it is: equal names are equal sizes.
struct Dimension {
    std::int64_t size = gka::unknown;
    std::string name;
};

struct Dimensions {
    using Value = Dimension;
    Value symbols[2];

    Value constant(std::int64_t value) const { return {value, std::to_string(value)}; }
    Value symbol(int which) const { return symbols[which]; }
    Value operation(gka::Term::Kind kind, const Value& a, const Value& b) const
    {
        if (a.size >= 0 && b.size >= 0) {
            const gka::Term terms[] = {{gka::Term::constant, a.size}, {gka::Term::constant, b.size}, {kind, 0}};
            return constant(gka::evaluate(gka::Size{terms, 3}, gka::Sizes{}));
        }
        static const char* const names[] = {"", "", "+", "*", "//", "%", "max", "min"};
        return {gka::unknown, "(" + a.name + " " + names[kind] + " " + b.name + ")"};
    }
};

// Which dimension of which input is B or T, as far as ONNX Runtime knows it.
void name_symbols(Dimensions& known, const gka::Tensor& tensor, const OrtTensorTypeAndShapeInfo* info, const gka::Given& given)
{
    std::vector<const char*> names(tensor.rank);
    check(api->GetSymbolicDimensions(info, names.data(), names.size()));
    for (int d = 0; d < tensor.rank; ++d) {
        const gka::Size& size = tensor.shape[d];
        if (size.count != 1 || size[0].kind != gka::Term::symbol)
            continue;
        Dimension& symbol = known.symbols[size[0].value];
        if (given.dims[d] >= 0)
            symbol = known.constant(given.dims[d]);
        else if (symbol.name.empty())
            symbol.name = names[d];
    }
}

OrtStatus* infer_shapes(int op, OrtShapeInferContext* context) noexcept
{
    return guarded([&] {
        const gka::Node node = read_node(op, ShapeAttributes{context});
        std::size_t count = 0;
        check(api->ShapeInferContext_GetInputCount(context, &count));
        if (static_cast<int>(count) != node.input_count())
            throw gka::Error("gka " + node.op() + ": expected as many inputs as the attribute inputs names, "
                + std::to_string(node.input_count()) + ", got " + std::to_string(count));
        std::vector<gka::Given> inputs;
        std::vector<OrtTensorTypeAndShapeInfo*> infos(count); // the context's own
        for (std::size_t i = 0; i < count; ++i) {
            check(api->ShapeInferContext_GetInputTypeShape(context, i, &infos[i]));
            inputs.push_back(given(infos[i]));
        }
        const gka::Variant& variant = node.get(inputs.data(), static_cast<int>(count));
        Dimensions known;
        for (int i = 0; i < variant.inputs.count; ++i)
            name_symbols(known, variant.inputs[i], infos[i], inputs[i]);
        static std::atomic<int> nameless{0};
        for (Dimension& symbol : known.symbols)
            if (symbol.name.empty())
                symbol.name = "gka_size_" + std::to_string(nameless++);
        for (int i = 0; i < variant.outputs.count; ++i) {
            const gka::Tensor& output = variant.outputs[i];
            const std::size_t rank = static_cast<std::size_t>(output.rank);
            std::int64_t sizes[gka::max_rank];
            std::string texts[gka::max_rank];
            const char* names[gka::max_rank];
            for (int d = 0; d < output.rank; ++d) {
                const Dimension dimension = gka::evaluate(output.shape[d], known);
                sizes[d] = dimension.size;
                texts[d] = dimension.size < 0 ? dimension.name : std::string();
                names[d] = texts[d].c_str();
            }
            const Info info;
            check(api->SetTensorElementType(info.get, type_of(output.type)));
            check(api->SetDimensions(info.get, sizes, rank));
            check(api->SetSymbolicDimensions(info.get, names, rank));
            check(api->ShapeInferContext_SetOutputTypeShape(context, static_cast<std::size_t>(i), info.get));
        }
    });
}

void compute(const gka::Node& node, OrtKernelContext* context)
{
    std::vector<gka::Given> tensors;
    std::vector<const void*> inputs;
    for (int i = 0; i < node.input_count(); ++i) {
        const OrtValue* value = nullptr;
        void* data = nullptr;
        check(api->KernelContext_GetInput(context, static_cast<std::size_t>(i), &value));
        tensors.push_back(given(Info(value).get));
        check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data)); // the interface has no other
        inputs.push_back(data);
    }
    const gka::Variant& variant = node.get(tensors.data(), node.input_count());
    const gka::Sizes sizes = gka::bind(variant, tensors.data());
    std::vector<void*> outputs;
    for (int i = 0; i < variant.outputs.count; ++i) {
        const gka::Tensor& output = variant.outputs[i];
        std::int64_t dims[gka::max_rank];
        for (int d = 0; d < output.rank; ++d)
            dims[d] = gka::evaluate(output.shape[d], sizes);
        OrtValue* value = nullptr;
        void* data = nullptr;
        check(api->KernelContext_GetOutput(context, static_cast<std::size_t>(i), dims, static_cast<std::size_t>(output.rank), &value));
        check(api->GetTensorMutableData(value, &data));
        outputs.push_back(data);
    }
    if (gka::workspace_bytes(variant, sizes))
        throw gka::Error("gka " + node.op() + ": expected kernels without temporaries, got a bundle that has some");
    void* stream = nullptr;
    check(api->KernelContext_GetGPUComputeStream(context, &stream));
    gka::launch(variant, sizes, inputs.data(), outputs.data(), nullptr, stream);
}

// --- registration -----------------------------------------------------------------------------------------------------------

// The inputs are one variadic one, of any types, for which of them there are is for the node to say.
struct Op : OrtCustomOp {
    int op;
    std::string name;

    Op(int op, int kind)
        : OrtCustomOp{}
        , op(op)
        , name(op_names[op] + (kind ? "_" + std::to_string(kind) : std::string()))
    {
        version = api_version;
        GetName = [](const OrtCustomOp* self) { return of(self).name.c_str(); };
        GetExecutionProviderType = [](const OrtCustomOp*) { return GKA_ORT_PROVIDER; };
        GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 1; };
        GetInputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
        GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_VARIADIC; };
        GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 2; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
        GetOutputTypeCount = [](const OrtCustomOp* self) -> std::size_t { return output_counts[of(self).op]; };
        GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
        GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_OPTIONAL; }; // or one type for all
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) { return infer_shapes(of(self).op, context); };
        CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
            return guarded([&] { *kernel = new gka::Node(read_node(of(self).op, KernelAttributes{info})); });
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            return guarded([&] { compute(*static_cast<const gka::Node*>(kernel), context); });
        };
        KernelDestroy = [](void* kernel) { delete static_cast<gka::Node*>(kernel); };
    }

    static const Op& of(const OrtCustomOp* self) { return *static_cast<const Op*>(self); }
};

} // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base)
{
    api = base->GetApi(api_version);
    if (!api)
        return base->GetApi(1)->CreateStatus(ORT_FAIL, "gka: expected ONNX Runtime 1.17 or later, got an older one");
    return guarded([&] {
        static const std::deque<Op>& ops = [] { // a session keeps pointers to them
            static std::deque<Op> made;
            for (int op = 0; op < 3; ++op)
                for (int kind = 0; kind < most_kinds; ++kind)
                    made.emplace_back(op, kind);
            return static_cast<std::deque<Op>&>(made);
        }();
        OrtCustomOpDomain* registered = nullptr; // the session keeps it, too
        check(api->CreateCustomOpDomain(domain, &registered));
        for (const Op& op : ops)
            check(api->CustomOpDomain_Add(registered, &op));
        check(api->AddCustomOpDomain(options, registered));
    });
}
