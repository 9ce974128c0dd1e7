"""cuDNN's e4m3 forward, by the nvidia-cudnn-frontend package: the peer of `bench_fp8.py`."""

import math
from collections.abc import Callable

import torch

P_SCALE = 256.0
"""What it multiplies P by before rounding it, as attngen does."""


def cudnn_fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descales: list[torch.Tensor], causal: bool
) -> Callable[[], torch.Tensor]:
    """A call on e4m3 tensors (batch, seqlen, heads, head_dim) with one descale a tensor; its output is e4m3 too.

    cuDNN 9.19 gives bf16 on Blackwell alone.
    """
    import cudnn

    f8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=f8, intermediate_data_type=f32, compute_data_type=f32)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    inputs = [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=f8) for x in heads]
    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    scales = {name: graph.tensor(**one, data_type=f32) for name in names}
    result, _, *largest = graph.sdpa_fp8(
        **dict(zip(("q", "k", "v"), inputs, strict=True)),
        **scales,
        is_inference=True,
        attn_scale=1 / math.sqrt(q.shape[3]),
        use_causal_mask=causal,
    )
    heads_out = out.transpose(1, 2)
    result.set_output(True).set_dim(list(heads_out.shape)).set_stride(list(heads_out.stride())).set_data_type(
        f8
    )
    for each in largest:
        each.set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(f32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    numbers = (*descales, *(torch.tensor(x, device=q.device) for x in (1 / P_SCALE, P_SCALE, 1.0)))
    memory = dict(zip(inputs, (q, k, v), strict=True)) | {result: out}
    memory |= {scales[n]: x.reshape(1, 1, 1, 1) for n, x in zip(names, numbers, strict=True)}
    memory |= {each: torch.zeros(1, 1, 1, 1, device=q.device) for each in largest}
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    def run() -> torch.Tensor:
        graph.execute(memory, workspace, handle=handle)
        return out

    return run
