// Writes site/, all that a static server needs: the page, its libraries from node_modules, and an exported model.
//   npm run copy -- FOLDER [FILE]
// FOLDER was written by `spikebert export --format onnx`; FILE is a graph in its onnx/, by default the int8 one.
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const site = join(here, "site");

function fail(message) {
  console.error(`copy: ${message}`);
  process.exit(1);
}

const [folder, asked] = process.argv.slice(2);
if (!folder) fail("name a folder: npm run copy -- FOLDER [FILE]");
const names = asked ? [asked] : ["model_int8.onnx", "model.onnx"];
const graph = names.map((name) => join(folder, "onnx", name)).find(existsSync);
if (!graph) {
  fail(`${join(folder, "onnx")} has no ${names.join(" and no ")}; \`spikebert export FOLDER --format onnx\` writes it`);
}
const ort = join(here, "node_modules", "onnxruntime-web", "dist");
const tokenizers = join(here, "node_modules", "@huggingface", "tokenizers", "dist");
if (!existsSync(ort) || !existsSync(tokenizers)) fail("node_modules is missing; run `npm ci` first");

// File in site/ and where it comes from.
const sources = {
  "index.html": join(here, "index.html"),
  "style.css": join(here, "style.css"),
  "app.js": join(here, "app.js"),
  "vendor/ort.wasm.min.mjs": join(ort, "ort.wasm.min.mjs"),
  "vendor/ort-wasm-simd-threaded.mjs": join(ort, "ort-wasm-simd-threaded.mjs"),
  "vendor/ort-wasm-simd-threaded.wasm": join(ort, "ort-wasm-simd-threaded.wasm"),
  "vendor/tokenizers.min.mjs": join(tokenizers, "tokenizers.min.mjs"),
  "model/config.json": join(folder, "config.json"),
  "model/tokenizer.json": join(folder, "tokenizer.json"),
  "model/tokenizer_config.json": join(folder, "tokenizer_config.json"),
  "model/model.onnx": graph,
};
const missing = Object.values(sources).find((source) => !existsSync(source));
if (missing) fail(`${missing} is missing`);

rmSync(site, { recursive: true, force: true });
const hash = createHash("sha256");
for (const [file, source] of Object.entries(sources)) {
  mkdirSync(dirname(join(site, file)), { recursive: true });
  cpSync(source, join(site, file));
  hash.update(file).update(readFileSync(source));
}
const worker = readFileSync(join(here, "sw.js"), "utf8")
  .replace("@VERSION@", hash.digest("hex").slice(0, 16))
  .replace('["@FILES@"]', JSON.stringify(["./", ...Object.keys(sources)]));
writeFileSync(join(site, "sw.js"), worker);
console.log(`${site}: ${basename(graph)} of ${resolve(folder)}`);
