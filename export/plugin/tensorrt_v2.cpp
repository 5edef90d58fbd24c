// Plugins of TensorRT 8.5 and 8.6: IPluginV2DynamicExt.
#include "tensorrt_common.h"

#if NV_TENSORRT_MAJOR < 10

namespace gka {
namespace {

using namespace nvinfer1;

constexpr std::uint32_t serial_version = 1;

class PluginV2 final : public IPluginV2DynamicExt {
public:
    explicit PluginV2(Node const& node)
        : plugin_(node)
    {
    }

    char const* getPluginType() const noexcept override { return plugin_.node.op().c_str(); }
    char const* getPluginVersion() const noexcept override { return plugin_version; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    int32_t getNbOutputs() const noexcept override { return plugin_.node.output_count(); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override { }
    void destroy() noexcept override { delete this; }

    IPluginV2DynamicExt* clone() const noexcept override
    {
        return guarded<IPluginV2DynamicExt*>(nullptr, [&] { return new PluginV2(*this); });
    }

    DataType getOutputDataType(int32_t index, DataType const* inputs, int32_t count) const noexcept override
    {
        return guarded(DataType::kFLOAT, [&] { return plugin_.output_type(index, inputs, count); });
    }

    DimsExprs getOutputDimensions(int32_t index, DimsExprs const* inputs, int32_t count, IExprBuilder& builder) noexcept override
    {
        return guarded(DimsExprs{-1, {}}, [&] { return plugin_.output_shape(index, inputs, count, builder); });
    }

    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        return guarded(false, [&] { return plugin_.supports(tensors, position + 1); });
    }

    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override { }

    std::size_t getWorkspaceSize(
        PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*, int32_t) const noexcept override
    {
        return guarded<std::size_t>(0, [&] { return plugin_.workspace(inputs, count); });
    }

    int32_t enqueue(PluginTensorDesc const* descs, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(1, [&] { return plugin_.enqueue(descs, inputs, outputs, workspace, stream); });
    }

    std::size_t getSerializationSize() const noexcept override
    {
        return sizeof serial_version + sizeof(Attributes) + plugin_.node.inputs().size();
    }

    void serialize(void* buffer) const noexcept override
    {
        char* place = static_cast<char*>(buffer);
        std::memcpy(place, &serial_version, sizeof serial_version);
        place += sizeof serial_version;
        std::memcpy(place, &plugin_.node.attributes(), sizeof(Attributes));
        std::string const& inputs = plugin_.node.inputs();
        std::memcpy(place + sizeof(Attributes), inputs.data(), inputs.size());
    }

    static PluginV2* deserialize(std::string const& op, void const* data, std::size_t length)
    {
        std::uint32_t version = 0;
        Attributes attributes{};
        if (length < sizeof version + sizeof attributes)
            throw Error("gka " + op + ": expected an engine of this library, got a plugin of " + std::to_string(length) + " bytes");
        char const* place = static_cast<char const*>(data);
        std::memcpy(&version, place, sizeof version);
        if (version != serial_version)
            throw Error("gka " + op + ": expected an engine of this library, version " + std::to_string(serial_version)
                + ", got version " + std::to_string(version) + ": build the engine again");
        std::memcpy(&attributes, place + sizeof version, sizeof attributes);
        std::size_t const head = sizeof version + sizeof attributes;
        return new PluginV2(Node(op, attributes, std::string(place + head, length - head)));
    }

private:
    Plugin plugin_;
    std::string namespace_ = plugin_namespace;
};

class Creator : public IPluginCreator {
public:
    explicit Creator(char const* op)
        : op_(op)
        , fields_(op)
    {
    }

    char const* getPluginName() const noexcept override { return op_; }
    char const* getPluginVersion() const noexcept override { return plugin_version; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }

    IPluginV2* createPlugin(char const*, PluginFieldCollection const* fields) noexcept override
    {
        return guarded<IPluginV2*>(nullptr, [&] { return new PluginV2(Fields::parse(op_, *fields)); });
    }

    IPluginV2* deserializePlugin(char const*, void const* data, std::size_t length) noexcept override
    {
        return guarded<IPluginV2*>(nullptr, [&] { return PluginV2::deserialize(op_, data, length); });
    }

private:
    char const* const op_;
    Fields const fields_;
    std::string namespace_ = plugin_namespace;
};

#if NV_TENSORRT_MINOR < 6 && NV_TENSORRT_MAJOR == 8

// The registry has no loadLibrary yet: register when loaded.
template <int which> struct CreatorOf final : Creator {
    CreatorOf()
        : Creator(op_names[which])
    {
    }
};
using ChunkState = CreatorOf<0>;
using ChunkOutput = CreatorOf<1>;
using Step = CreatorOf<2>;
REGISTER_TENSORRT_PLUGIN(ChunkState);
REGISTER_TENSORRT_PLUGIN(ChunkOutput);
REGISTER_TENSORRT_PLUGIN(Step);

ILogger* logger() { return ::getLogger(); }

#else

ILoggerFinder* finder = nullptr;

ILogger* logger() { return finder ? finder->findLogger() : nullptr; }

#endif

} // namespace

void report(char const* message) noexcept
{
    if (ILogger* const found = logger())
        found->log(ILogger::Severity::kERROR, message);
    else
        std::fprintf(stderr, "%s\n", message);
}

} // namespace gka

#if NV_TENSORRT_MINOR >= 6 || NV_TENSORRT_MAJOR == 9

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { gka::finder = finder; }

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count)
{
    static gka::Creator chunk_state(gka::op_names[0]), chunk_output(gka::op_names[1]), step(gka::op_names[2]);
    static nvinfer1::IPluginCreator* const creators[] = {&chunk_state, &chunk_output, &step};
    count = 3;
    return creators;
}

#endif

#endif
