// A CUDA device without a GPU, for a CPU build of torch: its tensors say cuda:N, lie in main memory, and are computed
// with by the CPU's kernels.
//
// Owns what torch asks of a backend in C++: the device guard, the hooks, and one fallback that serves every operator of
// the CUDA dispatch key. It refuses to mix devices, as CUDA's kernels do, and knows which memory is pinned. What Python
// asks of torch.cuda is simulated_cuda.py's. Streams run in order and at once: it shows which device holds what and
// when the host would wait, and says nothing of time, memory or rounding on a card.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr c10::DeviceIndex MOST_DEVICES = 2;

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex made_current(c10::DeviceIndex index) {
  const auto before = current;
  if (index >= 0) current = index;
  return before;
}

c10::Device device_of(c10::DeviceIndex index) { return c10::Device(c10::kCUDA, index); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device d) const override { return device_of(made_current(d.index())); }
  c10::Device getDevice() const override { return device_of(current); }
  void setDevice(c10::Device d) const override { made_current(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { made_current(d.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return MOST_DEVICES; }

  // One stream a device, which has always finished.
  c10::Stream getStream(c10::Device d) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device_of(d.index() < 0 ? 0 : d.index()));
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getStream(d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return getStream(s.device()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// Main memory as the CPU's allocator gives it, and whether an address is in it, as CUDA knows of pinned memory.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    auto* inner = new c10::DataPtr(c10::GetAllocator(c10::kCPU)->allocate(num_bytes));
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[inner->get()] = num_bytes;
    return c10::DataPtr(inner->get(), inner, &PinnedAllocator::freed, c10::Device(c10::kCPU));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
  bool holds(const void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = sizes_.upper_bound(address);
    if (after == sizes_.begin()) return false;
    const auto& [start, num_bytes] = *std::prev(after);
    return address < static_cast<const char*>(start) + num_bytes;
  }
  static PinnedAllocator& the() {
    static auto* only = new PinnedAllocator();  // never freed: tensors may outlive what is static
    return *only;
  }

 private:
  static void freed(void* inner) {
    auto* pointer = static_cast<c10::DataPtr*>(inner);
    {
      const std::lock_guard<std::mutex> lock(the().mutex_);
      the().sizes_.erase(pointer->get());
    }
    delete pointer;
  }
  std::mutex mutex_;
  std::map<const void*, size_t> sizes_;
};

struct SimulatedHooks : public at::CUDAHooksInterface {
  explicit SimulatedHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return MOST_DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { made_current(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return made_current(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return made_current(index); }
  bool isPinnedPtr(const void* address) const override { return PinnedAllocator::the().holds(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::the(); }
  at::Device getDeviceFromPtr(void*) const override { return device_of(current); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::detail::getDefaultCPUGenerator();  // the same draws as on the CPU
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// A storage on another device over the same memory, which it keeps alive.
c10::Storage shared_storage(const c10::Storage& storage, c10::Device device) {
  c10::DataPtr memory(
      const_cast<void*>(storage.data()), new c10::Storage(storage),
      [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  const bool is_cpu = device.is_cpu();  // alone it has an allocator, and can grow
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory),
      is_cpu ? c10::GetAllocator(c10::kCPU) : nullptr, is_cpu);
}

at::Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor_over(shared_storage(tensor.storage(), c10::Device(c10::kCPU)), c10::DispatchKey::CPU, tensor);
}

at::Tensor on_device(const at::Tensor& tensor, c10::DeviceIndex index) {
  return tensor_over(shared_storage(tensor.storage(), device_of(index)), c10::DispatchKey::CUDA, tensor);
}

void take_shape(const at::Tensor& to, const at::Tensor& from) {
  to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
}

// One call of an operator: its tensors as the CPU sees them, and its results as the device has them.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : name_(op.schema().name()) {
    if (!op.schema().overload_name().empty()) name_ += "." + op.schema().overload_name();
  }

  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return host_of(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> found;
      for (const at::Tensor& tensor : value.toTensorVector()) found.push_back(host_of(tensor));
      return found;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> found;
      for (const auto& tensor : value.toOptionalTensorVector())
        found.push_back(tensor.has_value() ? std::optional<at::Tensor>(host_of(*tensor)) : std::nullopt);
      return found;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      index_ = value.toDevice().has_index() ? value.toDevice().index() : current;
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  void check_devices() const {
    // A scalar in main memory may be mixed with anything.
    if (index_ >= 0 && has_cpu_tensor_ && !may_mix()) refuse("cpu");
  }

  // What the CPU's kernel resized in place, the device's tensor is resized to.
  void settle() const {
    for (const auto& [device, host] : pairs_) {
      const bool moved = host.storage().data() != device.storage().data();
      if (moved || host.storage().nbytes() != device.storage().nbytes())
        device.unsafeGetTensorImpl()->set_storage_keep_dtype(on_device(host, device.device().index()).storage());
      if (host.sizes() != device.sizes() || host.strides() != device.strides()) take_shape(device, host);
    }
  }

  c10::IValue result(const c10::IValue& value) const {
    if (value.isTensor()) return device_of_result(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> found;
      for (const at::Tensor& tensor : value.toTensorVector()) found.push_back(device_of_result(tensor));
      return found;
    }
    return value;
  }

 private:
  at::Tensor host_of(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      has_cpu_tensor_ = has_cpu_tensor_ || (tensor.device().is_cpu() && tensor.dim() > 0);
      return tensor;
    }
    const auto index = tensor.device().index();
    if (index_ >= 0 && index != index_ && tensor.dim() > 0 && !may_mix()) refuse("cuda:" + std::to_string(index));
    if (index_ < 0) index_ = index;
    for (const auto& [device, host] : pairs_)
      if (device.is_same(tensor)) return host;
    pairs_.emplace_back(tensor, on_host(tensor));
    return pairs_.back().second;
  }

  at::Tensor device_of_result(const at::Tensor& tensor) const {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const auto& [device, host] : pairs_)
      if (host.is_same(tensor)) return device;
    for (const auto& [device, host] : pairs_)
      if (host.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl())  // a view of an argument
        return tensor_over(c10::Storage(device.storage()), c10::DispatchKey::CUDA, tensor);
    return on_device(tensor, index_ < 0 ? current : index_);
  }

  // Copies are between devices; CUDA's indexing takes indices from main memory, for which the host waits.
  bool may_mix() const {
    static const std::set<std::string> names{
        "aten::copy_", "aten::_copy_from", "aten::index.Tensor", "aten::index.Tensor_out",
        "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
    return names.count(name_) > 0;
  }

  [[noreturn]] void refuse(const std::string& other) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                static_cast<int>(index_), " and ", other, "! (simulated, in ", name_, ")");
  }

  std::string name_;
  c10::DeviceIndex index_ = -1;
  bool has_cpu_tensor_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // the device's, and the same memory as the CPU sees it
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op);
  const auto num_arguments = op.schema().arguments().size(), first = stack->size() - num_arguments;
  for (size_t i = first; i < stack->size(); i++) (*stack)[i] = call.argument((*stack)[i]);
  call.check_devices();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++)
    (*stack)[i] = call.result((*stack)[i]);
}

// What the fallback cannot do: copies between devices, and what only makes another tensor over the same memory.

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  auto to = self.is_cuda() ? on_host(self) : self;
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  to.copy_(source.is_cuda() ? on_host(source) : source);
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& self, bool) {
  auto to = self;
  return copy_(to, source, false);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto needed = at::empty(size, self.options().device(c10::kCPU));
  if (self.storage().nbytes() < needed.storage().nbytes())
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(on_device(needed, self.device().index()).storage());
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor as_strided(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

at::Tensor& set_storage_offset(
    at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes), given = C10_AS_INTARRAYREF_SLOW(strides);
  std::vector<int64_t> stride(given.begin(), given.end());
  if (stride.size() != size.size()) {  // none was given: contiguous
    stride.assign(size.size(), 1);
    for (int i = static_cast<int>(size.size()) - 2; i >= 0; i--) stride[i] = stride[i + 1] * size[i + 1];
  }
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.expect_int());
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const std::vector<c10::SymInt> size{static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize())};
  return set_storage_offset(self, std::move(storage), 0, size, {});
}

}  // namespace

namespace at {
using CUDAHooks = SimulatedHooks;  // the name that the registry looks for
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks);
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_offset));
}
