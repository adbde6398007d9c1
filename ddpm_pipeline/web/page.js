// PAGE: controls, canvases and texts. What is computed is in worker.js and sampler.js.

import { TEXTS } from "./texts.js";

const COLUMNS = 10; // of the trajectory at most
const byId = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let page, where;
let texts = TEXTS[navigator.language.startsWith("zh") ? "zh" : "en"];
let status = (t) => t.loading; // a function, so that a change of the language changes it too

// ---- Texts ----

function showTexts() {
  document.documentElement.lang = texts === TEXTS.zh ? "zh" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = texts[element.dataset.text];
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = texts[element.dataset.label];
  page?.samplers.forEach(({ name, steps }, i) => { byId("sampler").options[i].text = texts[name](steps.length); });
  showStatus();
}

function showStatus(next = status) {
  status = next;
  byId("status").textContent = status(texts);
}

function fail(error) {
  document.body.dataset.state = "error";
  showStatus((t) => t.failed(error));
}

// ---- Images ----

function show(canvas, values) {
  const [height, width] = page.size, area = height * width;
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  const level = (value) => Math.round((Math.min(1, Math.max(-1, value)) + 1) * 127.5);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = level(values[page.channels === 1 ? i : c * area + i]);
    pixels.data[4 * i + 3] = page.channels === 4 ? level(values[3 * area + i]) : 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function addStep({ t, x_t, x_0_pred }) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  for (const values of [x_t, x_0_pred]) {
    const canvas = document.createElement("canvas");
    show(canvas, values);
    figure.append(canvas);
  }
  caption.textContent = `t = ${t}`;
  figure.append(caption);
  byId("trajectory").append(figure);
}

// ---- Sampling: one request at a time, the newest of those that wait next ----

let running = null;
const waiting = new Map();

function request(name, message, onImage, onStep) {
  waiting.set(name, { message, onImage, onStep });
  if (!running) startNext();
}

function startNext() {
  const [name] = waiting.keys();
  running = waiting.get(name) ?? null;
  if (!running) {
    document.body.dataset.state = "ready";
    return;
  }
  waiting.delete(name);
  document.body.dataset.state = "busy";
  showStatus((t) => t.busy);
  worker.postMessage({ id: name, ...running.message });
}

worker.onerror = (event) => fail(event.message);
worker.onmessage = ({ data }) => {
  if (data.error) {
    fail(data.error);
    if (data.id) startNext();
  } else if (data.page) {
    begin(data.page, data.backend);
  } else if (data.step) {
    byId("progress").value = data.progress;
    running.onStep?.(data.step);
  } else {
    running.onImage(data.image);
    showStatus((t) => t.done(data.steps, data.seconds.toFixed(1), where));
    const text = byId("status").textContent;
    startNext();
    if (running) byId("status").textContent = text;
  }
};

function label() {
  return page.classes ? byId("class").selectedIndex : 0;
}

function generate() {
  const sampler = byId("sampler").selectedIndex, steps = page.samplers[sampler].steps.length;
  const every = Math.ceil(steps / COLUMNS);
  let number = 0;
  const onStep = (step) => {
    if (number === 0) {
      byId("trajectory").replaceChildren();
      byId("save").disabled = true; // what is shown is no image yet
    }
    if (number % every === 0 || number === steps - 1) addStep(step);
    show(byId("image"), step.x_0_pred);
    number++;
  };
  const seeds = [Number(byId("seed").value)];
  request("generate", { seeds, sampler, label: label() }, (image) => {
    show(byId("image"), image);
    byId("save").disabled = false;
    byId("save").dataset.name = `seed-${seeds[0]}-${page.samplers[sampler].name}-${steps}.png`;
  }, onStep);
}

function interpolate() {
  if (!byId("interpolate").reportValidity()) return;
  const chosen = byId("sampler").selectedIndex, weight = Number(byId("weight").value);
  // a sampler that adds noise has no path between two images
  const sampler = page.samplers[chosen].is_deterministic ? chosen : page.samplers.length - 1;
  byId("weight-value").textContent = weight.toFixed(2);
  const seeds = [Number(byId("from").value), Number(byId("to").value)];
  request("interpolate", { seeds, weight, sampler, label: label() }, (image) => show(byId("between"), image));
}

// ---- Begin ----

function begin(settings, { provider, dtype }) {
  page = settings;
  where = `${provider === "webgpu" ? "WebGPU" : "WebAssembly"}, ${dtype}`;
  document.title = byId("title").textContent = page.title;
  byId("sampler").replaceChildren(...page.samplers.map(() => new Option()));
  byId("class").replaceChildren(...(page.classes ?? []).map((name) => new Option(name)));
  byId("class-label").hidden = !page.classes;
  for (const canvas of document.querySelectorAll("canvas.large")) [canvas.height, canvas.width] = page.size;
  for (const element of document.querySelectorAll(":disabled")) element.disabled = element.id === "save";
  showStatus((t) => t.ready);
  showTexts();
  generate();
  interpolate();
}

byId("generate").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("another").addEventListener("click", () => {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
  generate();
});
byId("save").addEventListener("click", (event) => {
  const link = document.createElement("a");
  link.href = byId("image").toDataURL("image/png");
  link.download = event.target.dataset.name;
  link.click();
});
byId("interpolate").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["from", "to", "class", "sampler"]) byId(id).addEventListener("change", () => page && interpolate());
byId("weight").addEventListener("input", interpolate);
byId("language").addEventListener("click", () => {
  texts = texts === TEXTS.en ? TEXTS.zh : TEXTS.en;
  showTexts();
});
showTexts();
