// Classifies while one types: tokenizer in JavaScript, the graph in WebAssembly.
import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const COLOURS = ["#2a7fba", "#d35400", "#27ae60", "#8e44ad", "#c0392b", "#7f8c8d"];
const KEPT_TIMES = 20; // sentences whose median time is shown

const element = (id) => document.getElementById(id);

async function readJson(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response.json();
}

/** Loads what `spikebert export --format onnx` has written; resolves to a function that classifies a text. */
async function load() {
  // Two threads took longer than one for a sentence, and they need headers of cross-origin isolation from the server.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("vendor/", document.baseURI).href;
  const [config, tokenizerJson, tokenizerConfig, session] = await Promise.all([
    readJson("model/config.json"),
    readJson("model/tokenizer.json"),
    readJson("model/tokenizer_config.json"),
    ort.InferenceSession.create("model/model.onnx", { executionProviders: ["wasm"] }),
  ]);
  const tokenizer = new Tokenizer(tokenizerJson, tokenizerConfig);
  const labels = config.id2label ?? { 0: "LABEL_0", 1: "LABEL_1" }; // transformers leaves out this default
  const toScores = scoreFunction(config.problem_type, Object.keys(labels).length);
  const maxLength = Math.min(tokenizerConfig.model_max_length ?? Infinity, config.max_position_embeddings ?? 512);

  return async function classify(text) {
    const start = performance.now();
    let { ids } = tokenizer.encode(text);
    const cut = ids.length > maxLength;
    if (cut) ids = [...ids.slice(0, maxLength - 1), ids.at(-1)]; // the last one ends a sentence
    const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
    if (session.inputNames.includes("token_type_ids")) feeds.token_type_ids = tensor(ids.map(() => 0));
    const outputs = await session.run(feeds);
    const logits = Array.from(outputs.logits.data); // [C]
    const scores = toScores(logits);
    const classes = logits.map((_, i) => ({ index: i, label: labels[i], score: scores[i] }));
    classes.sort((a, b) => b.score - a.score);
    const perStep = outputs.logits_per_step; // [T, 1, C]
    const steps = perStep && rowsOf(Array.from(perStep.data), logits.length);
    const milliseconds = performance.now() - start;
    const words = ids.map((id) => tokenizer.decode([id]));
    return { ids, words, cut, logits, classes, steps, spikes: outputs.spikes, milliseconds };
  };
}

/** By the rule of transformers' text-classification pipeline. */
function scoreFunction(problem, numLabels) {
  if (problem === "regression") return (logits) => logits;
  const isSigmoid = problem === "multi_label_classification" || numLabels === 1;
  return isSigmoid ? (logits) => logits.map((logit) => 1 / (1 + Math.exp(-logit))) : softmax;
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const exponentials = logits.map((logit) => Math.exp(logit - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((exponential) => exponential / sum);
}

function rowsOf(values, width) {
  return Array.from({ length: values.length / width }, (_, row) => values.slice(row * width, (row + 1) * width));
}

function showClasses(classes) {
  element("classes").replaceChildren(
    ...classes.map(({ label, score }) => {
      const item = document.createElement("li");
      const [name, meter, value] = ["span", "meter", "output"].map((tag) => document.createElement(tag));
      name.textContent = label;
      meter.value = score;
      value.textContent = `${(100 * score).toFixed(1)} %`;
      item.append(name, meter, value);
      return item;
    }),
  );
}

function draw(tag, attributes, text = "") {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  shape.textContent = text;
  return shape;
}

/** A line for each class over the time steps; one step alone is no line. */
function showSteps(steps, classes) {
  element("steps").hidden = !(steps?.length > 1);
  if (element("steps").hidden) return;
  const values = [0, ...steps.flat()];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (step) => 25 + (190 * step) / (steps.length - 1);
  const y = (value) => 100 - (90 * (value - low)) / (high - low || 1);
  const shapes = [
    draw("line", { class: "axis", x1: 25, x2: 215, y1: y(0), y2: y(0) }),
    draw("text", { x: 0, y: y(high) + 3 }, high.toFixed(1)),
    draw("text", { x: 0, y: y(low) + 3 }, low.toFixed(1)),
    ...steps.map((_, step) => draw("text", { x: x(step) - 2, y: 115 }, step + 1)),
  ];
  classes.forEach(({ index, label }, rank) => {
    const colour = COLOURS[index % COLOURS.length];
    const points = steps.map((row, step) => `${x(step)},${y(row[index])}`).join(" ");
    shapes.push(draw("polyline", { points, stroke: colour }));
    shapes.push(draw("text", { x: 222, y: 15 + 12 * rank, fill: colour }, label));
  });
  element("chart").replaceChildren(...shapes);
}

/** Each token a column, each block a band of rows: the darker, the more of a row's neurons fired there. */
function showSpikes(spikes, words) {
  element("spikes").hidden = !spikes;
  if (!spikes) return;
  const [blocks, steps, , length, width] = spikes.dims; // [N, T, 1, L, D]
  const [rows, gap] = [Math.min(48, width), 4];
  const canvas = element("raster");
  [canvas.width, canvas.height] = [length * steps, blocks * (rows + gap)];
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let block = 0; block < blocks; block++)
    for (let step = 0; step < steps; step++)
      for (let token = 0; token < length; token++) {
        const start = ((block * steps + step) * length + token) * width;
        for (let neuron = 0; neuron < width; neuron++) {
          if (!spikes.data[start + neuron]) continue;
          const y = block * (rows + gap) + Math.floor((neuron * rows) / width);
          const place = 4 * (y * canvas.width + token * steps + step);
          image.data.set([0, 114, 178], place); // readable on light and dark
          image.data[place + 3] = Math.min(255, image.data[place + 3] + 255 * Math.min(1, (2 * rows) / width));
        }
      }
  context.putImageData(image, 0, 0);
  const fired = spikes.data.reduce((sum, spike) => sum + spike, 0);
  element("rate").textContent = ((100 * fired) / spikes.data.length).toFixed(1);
  element("words").replaceChildren(
    ...words.map((word) => {
      const label = document.createElement("span");
      label.textContent = word || "\u00b7";
      return label;
    }),
  );
}

function showStatus(message, isError = false) {
  element("status").textContent = message;
  element("status").classList.toggle("error", isError);
}

/** Shows the text of the box; what was typed meanwhile is shown next, and what lies between is passed over. */
function watch(classify) {
  const times = [];
  let busy = false;

  async function show(text) {
    if (!text.trim()) {
      showClasses([]);
      showSteps(undefined, []);
      showSpikes(undefined, []);
      return showStatus("Write at least one word.");
    }
    const { ids, words, cut, classes, steps, spikes, milliseconds } = await classify(text);
    times.push(milliseconds);
    if (times.length > KEPT_TIMES) times.shift();
    const median = [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)];
    showClasses(classes);
    showSteps(steps, classes);
    showSpikes(spikes, words);
    const length = `${ids.length} tokens${cut ? " (cut)" : ""}`;
    showStatus(`${milliseconds.toFixed(1)} ms for ${length}; median of ${times.length}: ${median.toFixed(1)} ms`);
  }

  async function showLatest() {
    if (busy) return;
    busy = true;
    try {
      do {
        const text = element("text").value;
        await show(text);
        spikebert.shown = text;
      } while (spikebert.shown !== element("text").value);
    } catch (error) {
      showStatus(`The model failed: ${error.message}`, true);
    } finally {
      busy = false;
    }
  }

  element("text").addEventListener("input", showLatest);
  element("text").disabled = false;
  return showLatest();
}

// For the console, and for check.mjs.
globalThis.spikebert = { loaded: load() };
spikebert.loaded
  .then(watch)
  .catch((error) => showStatus(`The model could not be loaded: ${error.message}`, true));

// Afterwards the page opens without a network. Browsers allow it over https and on localhost alone.
navigator.serviceWorker?.register("sw.js");
