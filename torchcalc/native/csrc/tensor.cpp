#include "tensor.h"

#include <algorithm>

namespace torchcalc {

TensorList::TensorList(StableListHandle list) {
  size_t size = 0;
  torch_list_size(list, &size);
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    torch_list_get_item(list, i, &element);
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  torch_delete_list(list);
}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

void TensorList::append(TensorList&& other) {
  handles_.insert(handles_.end(), other.handles_.begin(), other.handles_.end());
  other.handles_.clear();
}

static int64_t itemsize(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    default:
      return 2;
  }
}

int64_t Dense::bytes() const { return numel * itemsize(dtype); }

bool Dense::same_layout(const Dense& other) const {
  if (numel != other.numel || dim != other.dim) return false;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != other.sizes[d]) return false;
    if (strides[d] != other.strides[d] && sizes[d] != 1 && numel > 1) return false;
  }
  return true;
}

static bool contiguous(const Dense& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim - 1; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// In some order of the dimensions each stride is the number of elements of all faster ones (channels_last, transposed).
static bool non_overlapping_and_dense(const Dense& t) {
  if (t.numel <= 1 || contiguous(t)) return true;
  constexpr int64_t most = 16;
  if (t.dim > most) return false;
  int64_t order[most];
  int64_t used = 0;
  for (int64_t d = 0; d < t.dim; ++d) {
    if (t.sizes[d] != 1) order[used++] = d;
  }
  std::sort(order, order + used, [&](int64_t a, int64_t b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (int64_t k = 0; k < used; ++k) {
    if (t.strides[order[k]] != expected) return false;
    expected *= t.sizes[order[k]];
  }
  return true;
}

namespace {
struct Codes {  // torch's numbers, which may change from version to version
  const int32_t cpu = aoti_torch_device_type_cpu();
  const int32_t strided = aoti_torch_layout_strided();
  const int32_t float32 = aoti_torch_dtype_float32();
  const int32_t float64 = aoti_torch_dtype_float64();
  const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  const int32_t float16 = aoti_torch_dtype_float16();
};
}  // namespace

static bool find_dtype(AtenTensorHandle tensor, const Codes& codes, Dtype& out) {
  int32_t code = -1;
  if (aoti_torch_get_dtype(tensor, &code) != 0) return false;
  if (code == codes.float32) {
    out = Dtype::float32;
  } else if (code == codes.float64) {
    out = Dtype::float64;
  } else if (code == codes.bfloat16) {
    out = Dtype::bfloat16;
  } else if (code == codes.float16) {
    out = Dtype::float16;
  } else {
    return false;
  }
  return true;
}

bool describe(AtenTensorHandle tensor, Access access, Dense& out) {
  static const Codes codes;
  int32_t device = -1, layout = -1;
  // Device and layout first: for other tensors the questions below are errors, which torch would log.
  if (aoti_torch_get_device_type(tensor, &device) != 0 || device != codes.cpu) return false;
  if (aoti_torch_get_layout(tensor, &layout) != 0 || layout != codes.strided) return false;
  if (!find_dtype(tensor, codes, out.dtype)) return false;
  int64_t *sizes = nullptr, *strides = nullptr;
  int64_t offset = 0, storage_bytes = 0;
  if (aoti_torch_get_numel(tensor, &out.numel) != 0 || aoti_torch_get_dim(tensor, &out.dim) != 0 ||
      aoti_torch_get_sizes(tensor, &sizes) != 0 || aoti_torch_get_strides(tensor, &strides) != 0 ||
      aoti_torch_get_storage_offset(tensor, &offset) != 0 ||
      aoti_torch_get_storage_size(tensor, &storage_bytes) != 0) {
    return false;
  }
  out.sizes = sizes;
  out.strides = strides;
  out.data = nullptr;
  if (out.numel == 0) return true;
  if (!non_overlapping_and_dense(out)) return false;
  // FSDP and others free a tensor by resizing its storage to nothing.
  if (offset * itemsize(out.dtype) + out.bytes() > storage_bytes) return false;
  void* data = nullptr;
  if (access == Access::write) {
    if (torch_get_mutable_data_ptr(tensor, &data) != 0) return false;
  } else {
    const void* readable = nullptr;
    if (torch_get_const_data_ptr(tensor, &readable) != 0) return false;
    data = const_cast<void*>(readable);
  }
  out.data = static_cast<char*>(data);
  return out.data != nullptr;
}

bool describe(AtenTensorHandle tensor, Access access, Scalar& out) {
  Dense dense;
  if (!describe(tensor, access, dense) || dense.numel != 1) return false;
  if (dense.dtype != Dtype::float32 && dense.dtype != Dtype::float64) return false;
  out.data = dense.data;
  out.is_double = dense.dtype == Dtype::float64;
  return true;
}

}  // namespace torchcalc
