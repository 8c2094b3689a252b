// The part of a pretended CUDA device that torch only takes from C++; the package beside it builds and loads it.
//
// torch's CPU build has every part of CUDA that is not a kernel: the dispatch key, autograd, the checks of each
// operation's formula. What is missing is registered here: the device guard (current device), the hooks (how many
// devices, pinned memory, generators), an allocator that counts, and the kernels that make or reinterpret tensors.
// All else falls to the one kernel in `kernels.py`.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr int kDevices = 8;
constexpr int kPinned = kDevices;  // the place of pinned host memory among the counters
constexpr int kForgotten = kDevices + 1;

int device_count = 0;
int64_t limits[kForgotten + 1];
int64_t live[kForgotten + 1], reserved[kForgotten + 1], peak[kForgotten + 1];  // bytes
struct Block {
  int64_t bytes;
  int place;
  int64_t serial;  // addresses come again, these do not
};
std::map<char*, Block> blocks;
std::mutex lock;
std::vector<int64_t> freed;  // serials of device memory
thread_local DeviceIndex current = 0;

void check_index(int index) {
  TORCH_CHECK(index >= 0 && index < device_count, "CUDA error: invalid device ordinal ", index);
}

// ---------------------------------------------------------------- memory

void forget(void* start) {
  std::lock_guard<std::mutex> hold(lock);
  auto block = blocks.find(static_cast<char*>(start));
  live[block->second.place] -= block->second.bytes;
  if (block->second.place < kDevices) freed.push_back(block->second.serial);
  blocks.erase(block);
}

void release(void* start) {
  forget(start);
  std::free(start);
}

int64_t next_serial() {
  static int64_t serial = 0;
  return ++serial;
}

void* obtain(size_t wanted, int place) {
  const int64_t bytes = (static_cast<int64_t>(std::max<size_t>(wanted, 1)) + 511) / 512 * 512;  // as CUDA's allocator
  std::lock_guard<std::mutex> hold(lock);
  TORCH_CHECK_WITH(
      OutOfMemoryError, live[place] + bytes <= limits[place], "CUDA out of memory. Tried to allocate ", bytes,
      " bytes. GPU ", place, " has a total capacity of ", limits[place], " bytes of which ",
      limits[place] - live[place], " are free.");
  void* start = std::aligned_alloc(512, bytes);
  TORCH_CHECK(start != nullptr, "no memory on the machine that pretends to have CUDA devices");
  std::memset(start, 0xff, bytes);  // not a number in every floating type: what is read before it is written shows
  blocks[static_cast<char*>(start)] = {bytes, place, next_serial()};
  live[place] += bytes;
  reserved[place] = std::max(reserved[place], live[place]);
  peak[place] = std::max(peak[place], live[place]);
  return start;
}

struct Memory final : c10::Allocator {
  bool pinned;
  explicit Memory(bool is_pinned) : pinned(is_pinned) {}
  c10::DataPtr allocate(size_t bytes) override {
    void* start = obtain(bytes, pinned ? kPinned : current);
    return {start, start, &release, pinned ? Device(DeviceType::CPU) : Device(DeviceType::CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory device_memory(false), pinned_memory(true);

bool is_pinned(const void* pointer) {
  auto* address = static_cast<char*>(const_cast<void*>(pointer));
  std::lock_guard<std::mutex> hold(lock);
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return false;
  --next;
  return next->second.place == kPinned && address < next->first + next->second.bytes;
}

// ---------------------------------------------------------------- devices

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    check_index(device.index());
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

// Random numbers come from a CPU generator inside; `kernels.py` passes its state on and back.
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  DeviceGenerator(DeviceIndex index, at::Generator source)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(std::move(source)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(device_.index(), inner.clone()); }
};

at::Generator new_generator(DeviceIndex index) {
  const DeviceIndex of = index < 0 ? current : index;
  check_index(of);
  return at::make_generator<DeviceGenerator>(of, at::detail::createCPUGenerator());
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasCUDA() const override { return device_count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count); }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { Guard().setDevice({DeviceType::CUDA, index}); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return Guard().exchangeDevice({DeviceType::CUDA, index}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static std::map<DeviceIndex, at::Generator> generators;
    const DeviceIndex of = index < 0 ? current : index;
    if (!generators.count(of)) generators[of] = new_generator(of);
    return generators[of];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override { return new_generator(index); }
  void deviceSynchronize(DeviceIndex) const override {}
};

// ---------------------------------------------------------------- kernels

Device settled(std::optional<Device> device) {
  const Device is = device.value_or(Device(DeviceType::CUDA));
  if (!is.has_index()) return {is.type(), current};
  check_index(is.index());
  return is;
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DeviceGuard guard(settled(device));
  return at::Tensor(at::detail::empty_generic(
      size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DeviceGuard guard(settled(device));
  return at::Tensor(at::detail::empty_strided_generic(
      size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype)));
}

// The CPU's kernels for views, `set_` and `resize_` look at sizes and storage only, and keep the tensor's device.
void on_metadata(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& self = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  const c10::DeviceGuard guard(self.device());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  for (const char* name :
       {"as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "resize_",
        "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_metadata>());
}

void* own_hooks = nullptr;  // the first word of an object with virtual functions is where they stand

}  // namespace

extern "C" {

void install(int count, const int64_t* memory) {
  static Guard guard;
  static Hooks hooks;
  device_count = count;
  for (auto& block : blocks) block.second.place = kForgotten;  // what earlier devices left behind
  for (int i = 0; i <= kForgotten; i++) {
    limits[i] = i < count ? memory[i] : INT64_MAX;
    reserved[i] = peak[i] = live[i] = 0;
  }
  current = 0;
  freed.clear();
  c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  c10::SetAllocator(DeviceType::CUDA, &device_memory);
  // torch has made its hooks already, for good: the ones of this file take their place in the same object.
  auto& in_use = *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()));
  if (own_hooks == nullptr) own_hooks = in_use;
  in_use = *reinterpret_cast<void**>(&hooks);
}

void uninstall() {
  device_count = 0;
  *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) = own_hooks;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(nullptr);
}

int get_device() { return current; }
int set_device(int index) {
  if (index < 0 || index >= device_count) return -1;
  current = static_cast<DeviceIndex>(index);
  return 0;
}
int64_t block_serial(void* start) {
  std::lock_guard<std::mutex> hold(lock);
  auto block = blocks.find(static_cast<char*>(start));
  return block == blocks.end() ? 0 : block->second.serial;
}
int pin(char* start, int64_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  if (live[kPinned] + bytes > limits[kPinned] || blocks.count(start)) return 1;
  blocks[start] = {bytes, kPinned, next_serial()};
  live[kPinned] += bytes;
  return 0;
}
int unpin(char* start) {
  forget(start);
  return 0;
}
void limit_pinned(int64_t bytes) { limits[kPinned] = bytes; }
int64_t take_freed() {
  std::lock_guard<std::mutex> hold(lock);
  if (freed.empty()) return 0;
  const int64_t serial = freed.back();
  freed.pop_back();
  return serial;
}
int64_t live_bytes(int place) { return live[place]; }
int64_t reserved_bytes(int place) { return reserved[place]; }
int64_t peak_bytes(int place) { return peak[place]; }
void reset_peak(int place) { peak[place] = live[place]; }
void empty_cache() {
  for (int i = 0; i <= kPinned; i++) reserved[i] = live[i];
}
}
