// Drives the TensorRT adapters of export/plugin for tests/test_plugin.py, as TensorRT would, against headers of any version.
//
//     op inputs num_heads chunk_size scale ridge_ratio num_iter
//     number of inputs
//     type rank sizes            a line per input, then one per output
#include <NvInfer.h>

#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
    void log(Severity, char const* message) noexcept override { std::cout << "log " << message << std::endl; }
} logger;

#if NV_TENSORRT_MAJOR >= 10
using Number = std::int64_t;
#else
using Number = std::int32_t;
#endif

struct Dimension : IDimensionExpr, apiv::VDimensionExpr {
    Dimension(bool known, Number value)
        : known(known)
        , value(value)
    {
        mImpl = this;
    }
    bool isConstant() const override { return known; }
    Number getConstantValue() const override { return value; }
#if NV_TENSORRT_MAJOR >= 10
    bool isSizeTensor() const override { return false; }
#endif
    bool known;
    Number value; // also of what is not known to the plugin
};

struct Builder : IExprBuilder, apiv::VExprBuilder {
    Builder() { mImpl = this; }
    std::vector<std::unique_ptr<Dimension>> held;
    IDimensionExpr const* make(bool known, Number value)
    {
        held.push_back(std::make_unique<Dimension>(known, value));
        return held.back().get();
    }
    IDimensionExpr const* constant(Number value) override { return make(true, value); }
#if NV_TENSORRT_MAJOR >= 10
    IDimensionExpr const* declareSizeTensor(std::int32_t, IDimensionExpr const&, IDimensionExpr const&) override { return nullptr; }
#endif
    IDimensionExpr const* operation(DimensionOperation kind, IDimensionExpr const& first, IDimensionExpr const& second) override
    {
        Number const a = static_cast<Dimension const&>(first).value, b = static_cast<Dimension const&>(second).value;
        switch (kind) {
        case DimensionOperation::kSUM: return make(false, a + b);
        case DimensionOperation::kPROD: return make(false, a * b);
        case DimensionOperation::kSUB: return make(false, a - b);
        case DimensionOperation::kMAX: return make(false, a > b ? a : b);
        case DimensionOperation::kMIN: return make(false, a < b ? a : b);
        case DimensionOperation::kFLOOR_DIV: return make(false, a / b);
        default: return nullptr;
        }
    }
};

DataType type_of(int number)
{
#if NV_TENSORRT_MAJOR >= 10
    if (number == 2)
        return DataType::kBF16;
#endif
    return number == 0 ? DataType::kFLOAT : number == 1 ? DataType::kHALF : DataType::kINT8;
}

void print(DataType type)
{
    for (int number = 0; number < 3; ++number)
        if (type == type_of(number)) {
            std::cout << " " << number;
            return;
        }
}

} // namespace

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6

#if NV_TENSORRT_MAJOR >= 10
extern "C" IPluginCreatorInterface* const* getCreators(std::int32_t& count);
constexpr auto listed = getCreators;
using Creator = IPluginCreatorV3One;
#else
extern "C" IPluginCreator* const* getPluginCreators(std::int32_t& count);
constexpr auto listed = getPluginCreators;
using Creator = IPluginCreator;
#endif

extern "C" void setLoggerFinder(ILoggerFinder* finder);
struct Finder : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
} finder;

std::vector<Creator*> all_creators()
{
    setLoggerFinder(&finder);
    int count = 0;
    auto const found = listed(count);
    std::vector<Creator*> creators;
    for (int i = 0; i < count; ++i)
        creators.push_back(static_cast<Creator*>(found[i]));
    return creators;
}

#else

using Creator = IPluginCreator;

struct Registry : IPluginRegistry {
    std::vector<Creator*> creators;
    bool registerCreator(IPluginCreator& creator, AsciiChar const* const name) noexcept override
    {
        creators.push_back(&creator);
        return !*name;
    }
    IPluginCreator* const* getPluginCreatorList(std::int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        return nullptr;
    }
    void setErrorRecorder(IErrorRecorder* const) noexcept override { }
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
};

Registry& registry()
{
    static Registry instance;
    return instance;
}

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry(); }
extern "C" ILogger* getLogger() noexcept { return &logger; }

std::vector<Creator*> all_creators() { return registry().creators; }

#endif

int main()
{
    std::string op, inputs;
    std::int32_t num_heads, chunk_size, num_iter, count;
    float scale, ridge_ratio;
    std::cin >> op >> inputs >> num_heads >> chunk_size >> scale >> ridge_ratio >> num_iter >> count;
    std::vector<PluginTensorDesc> descs;
    PluginTensorDesc desc{};
    desc.format = TensorFormat::kLINEAR;
    for (int type; std::cin >> type >> desc.dims.nbDims; descs.push_back(desc)) {
        desc.type = type_of(type);
        for (int d = 0; d < desc.dims.nbDims; ++d)
            std::cin >> desc.dims.d[d];
    }

    Creator* creator = nullptr;
    for (Creator* each : all_creators()) {
        std::cout << "creator " << each->getPluginName() << " " << each->getPluginVersion() << " '" << each->getPluginNamespace()
                  << "'";
        for (int i = 0; i < each->getFieldNames()->nbFields; ++i)
            std::cout << " " << each->getFieldNames()->fields[i].name;
        std::cout << std::endl;
        if (each->getPluginName() == op)
            creator = each;
    }
    std::vector<PluginField> fields; // as the ONNX parser passes them: those that the creator names
    for (int i = 0; i < creator->getFieldNames()->nbFields; ++i) {
        std::string const name = creator->getFieldNames()->fields[i].name;
        void const* data = name == "num_heads" ? static_cast<void const*>(&num_heads)
            : name == "chunk_size"             ? static_cast<void const*>(&chunk_size)
            : name == "num_iter"               ? static_cast<void const*>(&num_iter)
            : name == "scale"                  ? static_cast<void const*>(&scale)
            : name == "ridge_ratio"            ? static_cast<void const*>(&ridge_ratio)
                                               : inputs.data();
        int const length = name == "inputs" ? static_cast<int>(inputs.size()) : 1;
        fields.emplace_back(creator->getFieldNames()->fields[i].name, data, creator->getFieldNames()->fields[i].type, length);
    }
    PluginFieldCollection collection{};
    collection.nbFields = static_cast<int>(fields.size());
    collection.fields = fields.data();

#if NV_TENSORRT_MAJOR >= 10
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin("node", &collection, TensorRTPhase::kBUILD));
    if (!plugin)
        return 0;
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    std::cout << "plugin " << core->getPluginName() << " " << core->getPluginVersion() << std::endl;
#else
    auto* const build = static_cast<IPluginV2DynamicExt*>(creator->createPlugin("node", &collection));
    if (!build)
        return 0;
    std::cout << "plugin " << build->getPluginType() << " " << build->getPluginVersion() << std::endl;
#endif
    int const outputs = build->getNbOutputs();
    std::cout << "outputs " << outputs << std::endl;

    std::vector<DataType> types;
    std::vector<DimsExprs> shapes(count);
    Builder builder;
    for (int i = 0; i < count; ++i) {
        types.push_back(descs[i].type);
        shapes[i].nbDims = descs[i].dims.nbDims;
        for (int d = 0; d < shapes[i].nbDims; ++d) // what may be batch or length is not known when a network is built
            shapes[i].d[d] = builder.make(d > 1, static_cast<Number>(descs[i].dims.d[d]));
    }
#if NV_TENSORRT_MAJOR >= 10
    std::vector<DataType> output_types(outputs);
    std::vector<DimsExprs> output_shapes(outputs);
    int const typed = build->getOutputDataTypes(output_types.data(), outputs, types.data(), count);
    int const shaped = build->getOutputShapes(shapes.data(), count, nullptr, 0, output_shapes.data(), outputs, builder);
    std::cout << "status " << typed << " " << shaped << std::endl;
#endif
    for (int i = 0; i < outputs; ++i) {
#if NV_TENSORRT_MAJOR >= 10
        DataType const type = output_types[i];
        DimsExprs const shape = output_shapes[i];
#else
        DataType const type = build->getOutputDataType(i, types.data(), count);
        DimsExprs const shape = build->getOutputDimensions(i, shapes.data(), count, builder);
#endif
        std::cout << "output";
        print(type);
        for (int d = 0; d < shape.nbDims; ++d)
            std::cout << " " << static_cast<Dimension const*>(shape.d[d])->value;
        std::cout << std::endl;
    }

#if NV_TENSORRT_MAJOR >= 10
    std::vector<DynamicPluginTensorDesc> tensors(descs.size());
    for (std::size_t i = 0; i < descs.size(); ++i) {
        tensors[i].desc = descs[i];
        tensors[i].min = tensors[i].opt = tensors[i].max = descs[i].dims;
        tensors[i].desc.dims.d[0] = tensors[i].desc.dims.d[1] = -1; // as at build time
    }
    auto& first = tensors[0].desc;
#else
    std::vector<PluginTensorDesc> tensors = descs;
    auto& first = tensors[0];
#endif
    std::cout << "supports";
    for (std::size_t i = 0; i < tensors.size(); ++i)
        std::cout << " " << build->supportsFormatCombination(static_cast<int>(i), tensors.data(), count, outputs);
    first.type = DataType::kINT8;
    std::cout << " " << build->supportsFormatCombination(0, tensors.data(), count, outputs);
    first.type = descs[0].type;
    first.format = TensorFormat::kCHW32;
    std::cout << " " << build->supportsFormatCombination(0, tensors.data(), count, outputs) << std::endl;
    first.format = TensorFormat::kLINEAR;
    std::cout << "workspace " << build->getWorkspaceSize(tensors.data(), count, tensors.data() + count, outputs) << std::endl;

    // through a plan and back
#if NV_TENSORRT_MAJOR >= 10
    auto* const saved
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME))->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("node", saved, TensorRTPhase::kRUNTIME));
    auto* const loaded_runtime = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(loaded_runtime->attachToContext(nullptr));
    auto* const runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
#else
    std::string plan(build->getSerializationSize(), '\0');
    build->serialize(&plan[0]);
    auto* const loaded = static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("node", plan.data(), plan.size()));
    auto* const runtime = loaded->clone();
    plan[0] ^= 1;
    bool const refused = creator->deserializePlugin("node", plan.data(), plan.size()) == nullptr;
    std::cout << "stale " << refused << std::endl;
#endif
    std::vector<void const*> given;
    std::vector<void*> made;
    for (std::intptr_t i = 0; i < count; ++i)
        given.push_back(reinterpret_cast<void const*>((i + 1) << 20));
    for (std::intptr_t i = 0; i < outputs; ++i)
        made.push_back(reinterpret_cast<void*>((i + 1) << 30));
    void* const workspace = reinterpret_cast<void*>(std::intptr_t{1} << 40);
    auto* const stream = reinterpret_cast<cudaStream_t>(7);
    for (int repeat = 0; repeat < 2; ++repeat) {
        int const status = runtime->enqueue(descs.data(), descs.data() + count, given.data(), made.data(), workspace, stream);
        std::cout << "enqueue " << status << std::endl;
        descs[1].dims.d[0] += 1; // which disagrees with the others
    }
#if NV_TENSORRT_MAJOR < 10
    runtime->destroy();
    loaded->destroy();
    build->destroy();
#endif
}
