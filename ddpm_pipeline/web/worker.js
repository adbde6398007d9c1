// WORKER: loads the network and samples, beside the page, which stays responsive.

import * as ort from "./onnxruntime/ort.webgpu.bundle.min.mjs";
import { Generator, sample, slerp } from "./sampler.js";

let page, session, label;
let queue = load(); // one task after the other
onmessage = ({ data }) => {
  queue = queue.then(() => run(data)).catch((error) => postMessage({ id: data.id, error: String(error) }));
};

async function load() {
  try {
    page = await (await get("page.json")).json();
    ort.env.wasm.wasmBinary = await unzip(await get("onnxruntime/ort-wasm-simd-threaded.asyncify.wasm.gz"));
    // several threads need headers: README.md asks the Hub for them
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    ort.env.logLevel = "error";
    const weights = new Uint8Array(await (await get("weights.bin")).arrayBuffer());
    const backend = await start(weights);
    postMessage({ page, backend });
  } catch (error) {
    postMessage({ error: String(error) });
    throw error;
  }
}

async function get(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response;
}

/** The bytes of a gzip file, which some servers let the browser unzip on its way. */
async function unzip(response) {
  const data = await response.arrayBuffer();
  const [first, second] = new Uint8Array(data, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return data;
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** A session on WebGPU where there is one that gives the network's numbers, else on WebAssembly. */
async function start(weights) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const half = adapter?.features.has("shader-f16") && page.networks.includes("float16");
  const choices = adapter ? [["webgpu", half ? "float16" : "float32"], ["wasm", "float32"]] : [["wasm", "float32"]];
  for (const [provider, dtype] of choices) {
    try {
      const graph = new Uint8Array(await (await get(`network.${dtype}.onnx`)).arrayBuffer());
      const externalData = [{ path: "weights.bin", data: weights }];
      session = await ort.InferenceSession.create(graph, { executionProviders: [provider], externalData });
      label = 0;
      const { height, width, channels } = size();
      const output = await network(new Float32Array(channels * height * width), 0); // compiles, too
      if (!output.every(Number.isFinite)) throw new Error("the network's output is not finite");
      return { provider, dtype };
    } catch (error) {
      if (provider === "wasm") throw error;
    }
  }
}

function size() {
  return { height: page.size[0], width: page.size[1], channels: page.channels };
}

async function network(x, t) {
  const { height, width, channels } = size();
  const inputs = { x_t: new ort.Tensor("float32", x, [1, channels, height, width]), t: new ort.Tensor("float32", [t], [1]) };
  if (page.classes) inputs.label = new ort.Tensor("int32", [label], [1]);
  const { prediction } = await session.run(inputs);
  const values = prediction.data.slice();
  prediction.dispose();
  return values;
}

/** {id, seeds: one or two, weight between them, sampler: its number, label} to steps and an image. */
async function run({ id, seeds, weight, sampler: number, label: chosen }) {
  const { height, width, channels } = size();
  const generators = seeds.map((seed) => new Generator(seed));
  const noises = generators.map((generator) => generator.normal(channels * height * width));
  const noise = seeds.length === 2 ? slerp(...noises, weight) : noises[0];
  label = chosen;
  const steps = page.samplers[number].steps.length, began = performance.now();
  let done = 0;
  const onStep = (step) => postMessage({ id, step, progress: ++done / steps });
  const image = await sample(network, page.samplers[number], page.bound, noise, generators[0], onStep);
  postMessage({ id, image, steps, seconds: (performance.now() - began) / 1000 });
}
