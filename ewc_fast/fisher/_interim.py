import torch, torch.nn.functional as F
from ewc_fast import functional
def accumulate_squared_product_(total, grads, inputs):
    dt = total.dtype
    if grads.shape[1] == 1:
        total.addmm_(grads[:, 0].to(dt).square().t(), inputs[:, 0].to(dt).square()); return
    size = total.numel() * 4
    c = max(1, 2 * 2**20 // max(size, 1))
    for s in range(0, len(grads), c):
        p = torch.bmm(grads[s:s+c].to(dt).transpose(1, 2), inputs[s:s+c].to(dt))
        total.add_(p.square_().sum(0)) if not total.is_contiguous() else functional.accumulate_square_(total, p)
def accumulate_squared_convolution_(total, grads, inputs, *, stride, padding, dilation, groups):
    dt = total.dtype
    like = total.new_empty(total.shape)
    for n in range(len(grads)):
        g = torch.ops.aten.convolution_backward(grads[n:n+1].to(dt), inputs[n:n+1].to(dt), like, None, stride, padding, dilation, False, [0]*len(stride), groups, (False, True, False))[1]
        total.add_(g.square_())
functional.accumulate_squared_product_ = accumulate_squared_product_
functional.accumulate_squared_convolution_ = accumulate_squared_convolution_
