"""ONNX NETWORK: a U-net as ONNX files for browsers, compared with torch's in float32.

    network.float32.onnx   computes in float32: WebAssembly, and WebGPU without half precision
    network.float16.onnx   computes in float16: WebGPU with half precision
    weights.bin            the weights of both

The weights are stored once. Rounded to float16 they take half the space, and a page is loaded more often than it is
made.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from .images import check_image_size

MAX_ERROR = 1e-3  # of a network, relative: see `relative_error`
STORED_ALONE = 256  # values from which on a tensor is in weights.bin; smaller ones stay in the graph, as they are


def write_networks(unet: UNet2DModel, folder: Path) -> dict[str, float]:
    """Write the networks and their weights to a folder.

    A network that float16 is too coarse for is there in float32 alone; if its weights rounded to float16 are, too,
    they are stored in float32.

    Returns:
        the relative error of each network, by its dtype.
    Raises:
        ValueError: the network computes something else as ONNX than in torch.
    """
    reference = ExportedNetwork(unet)
    model = to_onnx(reference)
    variants = {"float32": model, "float16": in_float16(model)}
    errors = store_networks(variants, np.float16, reference, folder)
    if not errors["float32"] <= MAX_ERROR:  # nan too
        del variants["float16"]
        (folder / "network.float16.onnx").unlink()
        errors = store_networks(variants, np.float32, reference, folder)
    elif not errors["float16"] <= MAX_ERROR:
        (folder / "network.float16.onnx").unlink()
        del errors["float16"]
    if not errors["float32"] <= MAX_ERROR:
        raise ValueError(
            f"the network as ONNX differs from torch's by {errors['float32']:.1e}, more than {MAX_ERROR:g}"
        )
    return errors


def store_networks(models: dict[str, Any], dtype: Any, reference: ExportedNetwork, folder: Path) -> dict[str, float]:
    """Write models, by name, with weights of a dtype of numpy; their relative errors, by name."""
    offsets: dict[bytes, int] = {}
    for name, model in models.items():
        (folder / f"network.{name}.onnx").write_bytes(separate_weights(model, dtype, offsets))
    (folder / "weights.bin").write_bytes(b"".join(offsets))
    return {name: relative_error(reference, folder / f"network.{name}.onnx") for name in models}


class ExportedNetwork(nn.Module):
    """What is exported: the prediction for x_t. A learned variance is left out: no sampler of the page uses it."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        # a plain copy: the layers of a network that has sampled are our faster ones
        self.unet = UNet2DModel.from_config(unet.config)
        self.unet.load_state_dict(unet.state_dict())
        self.channels = unet.config["in_channels"]
        self.eval()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        output: Tensor = self.unet(x_t, t, class_labels=label, return_dict=False)[0]
        return output[:, : self.channels]


def example_inputs(unet: UNet2DModel, t: int) -> dict[str, Tensor]:
    """A noise image at index t, (1, C, H, W), float32; t (1,), float32; for a network with classes a label (1,)."""
    noise = torch.randn(
        1,
        unet.config["in_channels"],
        *check_image_size(unet, None, None, None),
        generator=torch.Generator().manual_seed(t),
    )
    inputs = {"x_t": noise, "t": torch.tensor([float(t)])}
    if unet.config["num_class_embeds"] is not None:
        inputs["label"] = torch.zeros(1, dtype=torch.int32)
    return inputs


def to_onnx(network: ExportedNetwork) -> Any:
    """The network as an onnx.ModelProto for batches of one image, in float32."""
    inputs = example_inputs(network.unet, 1)
    with _quiet():
        program = torch.onnx.export(
            network, tuple(inputs.values()), dynamo=True, verbose=False, input_names=[*inputs],
            output_names=["prediction"],
        )  # fmt: skip
    assert program is not None  # it writes a file only if it is given a name
    model = program.model_proto
    for node in model.graph.node:  # where in the code it comes from, with paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the export says of itself: operators of torchvision that it leaves out, a function of torch's that
    torch has deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def in_float16(model: Any) -> Any:
    """The model computing in float16, with inputs and output in float32. A second export would take far longer.

    As in torch, the embedding of t is computed in float32, up to the first product with weights.
    """
    import onnx

    graph, dtypes = model.graph, onnx.TensorProto
    constants = {tensor.name: tensor for tensor in graph.initializer}
    embedding = {"t"}  # what is computed from t and constants alone
    nodes: dict[str, Any] = {}  # by the name of their output
    tensors: dict[str, Any] = {}

    def cast(name: str, dtype: int, converted: str) -> str:
        nodes[converted] = onnx.helper.make_node("Cast", [name], [converted], to=dtype)
        return converted

    def as_float16(name: str, stays_float32: bool) -> str:
        """The name of an input of a node, which is there in the dtype that the node needs."""
        tensor = constants.get(name)
        if tensor is None:
            is_float32 = name == "x_t" or name in embedding
            return cast(name, dtypes.FLOAT16, f"{name}.float16") if is_float32 and not stays_float32 else name
        if tensor.data_type == dtypes.FLOAT and not stays_float32:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor = onnx.numpy_helper.from_array(values, f"{name}.float16")
        tensors[tensor.name] = tensor
        return str(tensor.name)

    for original in graph.node:
        inputs = set(original.input)
        of_t = original.op_type != "Gemm" and embedding & inputs and inputs <= embedding | constants.keys()
        stays_float32 = of_t or original.op_type == "Resize"  # the scales of Resize are in float32; it has no weights
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:] = [as_float16(name, stays_float32) for name in node.input]
        nodes[node.output[0]] = node
        embedding.update(node.output if of_t else ())
    (output,) = graph.output
    nodes[output.name].output[0] = f"{output.name}.float16"
    last = onnx.helper.make_node("Cast", [f"{output.name}.float16"], [output.name], to=dtypes.FLOAT)
    half = onnx.helper.make_graph([*nodes.values(), last], graph.name, graph.input, graph.output, [*tensors.values()])
    return onnx.helper.make_model(half, opset_imports=model.opset_import, ir_version=model.ir_version)


def separate_weights(model: Any, dtype: Any, offsets: dict[bytes, int]) -> bytes:
    """A model, serialized, whose tensors of many values are in weights.bin.

    Args:
        dtype: of numpy, of the weights in weights.bin.
        offsets: for each tensor in weights.bin, in its order, where it starts; new ones are added. Those that several
            models have are stored once.
    """
    import onnx

    end = sum(map(len, offsets))
    tensors, casts = [], []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype not in (np.float32, np.float16) or values.size < STORED_ALONE:
            tensors.append(tensor)
            continue
        data = values.astype(dtype).tobytes()
        if data not in offsets:
            offsets[data] = end
            end += len(data)
        name = tensor.name
        if values.dtype != dtype:  # ONNX Runtime does this once, when it loads the network
            name = f"{name}.stored"
            casts.append(onnx.helper.make_node("Cast", [name], [tensor.name], to=tensor.data_type))
        stored = onnx.TensorProto(
            name=name,
            dims=tensor.dims,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in ("location", "weights.bin"), ("offset", offsets[data]), ("length", len(data)):
            stored.external_data.add(key=key, value=str(value))
        tensors.append(stored)
    old = model.graph
    graph = onnx.helper.make_graph([*casts, *old.node], old.name, old.input, old.output, tensors)
    model = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(model.SerializeToString())


def relative_error(network: ExportedNetwork, path: Path) -> float:
    """Root mean square of ONNX Runtime's output minus torch's, over that of torch's: the largest of three timesteps."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for t in (0, 499, 999):
        inputs = example_inputs(network.unet, t)
        with torch.no_grad():
            expected = network(**inputs)
        (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        errors.append(((torch.from_numpy(output) - expected).norm() / expected.norm()).item())
    return max(errors, key=lambda error: float("inf") if error != error else error)
