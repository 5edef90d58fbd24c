// Plugins of TensorRT 10 and later: IPluginV3.
#include "tensorrt_common.h"

#if NV_TENSORRT_MAJOR >= 10

namespace gka {
namespace {

using namespace nvinfer1;

ILoggerFinder* finder = nullptr;

class PluginV3 final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit PluginV3(Node const& node)
        : plugin_(node)
        , fields_(plugin_.node)
    {
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type) {
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        default: return static_cast<IPluginV3OneCore*>(this);
        }
    }

    IPluginV3* clone() noexcept override
    {
        return guarded<IPluginV3*>(nullptr, [&] { return new PluginV3(plugin_.node); });
    }

    // core
    char const* getPluginName() const noexcept override { return plugin_.node.op().c_str(); }
    char const* getPluginVersion() const noexcept override { return plugin_version; }
    char const* getPluginNamespace() const noexcept override { return plugin_namespace; }

    // build
    int32_t getNbOutputs() const noexcept override { return plugin_.node.output_count(); }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override
    {
        return 0;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* inputs, int32_t count) const noexcept override
    {
        return guarded(1, [&] {
            for (int i = 0; i < outputs; ++i)
                types[i] = plugin_.output_type(i, inputs, count);
            return 0;
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* shapes, int32_t outputs,
        IExprBuilder& builder) noexcept override
    {
        return guarded(1, [&] {
            for (int i = 0; i < outputs; ++i)
                shapes[i] = plugin_.output_shape(i, inputs, count, builder);
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        return guarded(false, [&] { return plugin_.supports(tensors, position + 1); });
    }

    std::size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        return guarded<std::size_t>(0, [&] {
            std::vector<PluginTensorDesc> largest;
            for (int i = 0; i < count; ++i) {
                largest.push_back(inputs[i].desc);
                largest.back().dims = inputs[i].max;
            }
            return plugin_.workspace(largest.data(), count);
        });
    }

    // runtime
    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override { return 0; }

    int32_t enqueue(PluginTensorDesc const* descs, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(1, [&] { return plugin_.enqueue(descs, inputs, outputs, workspace, stream); });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return fields_.collection(); }

private:
    Plugin plugin_;
    Fields fields_;
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(char const* op)
        : op_(op)
        , fields_(op)
    {
    }

    char const* getPluginName() const noexcept override { return op_; }
    char const* getPluginVersion() const noexcept override { return plugin_version; }
    char const* getPluginNamespace() const noexcept override { return plugin_namespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }

    IPluginV3* createPlugin(char const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override
    {
        return guarded<IPluginV3*>(nullptr, [&] { return new PluginV3(Fields::parse(op_, *fields)); });
    }

private:
    char const* const op_;
    Fields const fields_;
};

} // namespace

void report(char const* message) noexcept
{
    if (ILogger* const logger = finder ? finder->findLogger() : nullptr)
        logger->log(ILogger::Severity::kERROR, message);
    else
        std::fprintf(stderr, "%s\n", message);
}

} // namespace gka

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { gka::finder = finder; }

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static gka::Creator chunk_state(gka::op_names[0]), chunk_output(gka::op_names[1]), step(gka::op_names[2]);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&chunk_state, &chunk_output, &step};
    count = 3;
    return creators;
}

#endif
