// Drives headless Chromium for tests/test_browser.py: reads lines of JSON from stdin, answers each with one.
//   node check.mjs CHROMIUM URL
// A line is {"texts": [...]}, which opens the page and classifies them, {"type": "..."}, which types into the box and
// answers what the page shows, or {"screenshot": FILE}.
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
const requests = [];
const errors = [];
page.on("request", (request) => requests.push(request.url()));
page.on("pageerror", (error) => errors.push(error.message));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));

async function answer({ texts, type, screenshot }) {
  if (texts) {
    await page.goto(url);
    const results = await page.evaluate(async (texts) => {
      const classify = await spikebert.loaded;
      await navigator.serviceWorker.ready; // from here on the page is kept
      const results = [];
      for (const text of texts) results.push(await classify(text));
      return results;
    }, texts);
    return { results, requests, errors };
  }
  if (screenshot) return await page.screenshot({ path: screenshot }).then(() => ({}));
  await page.fill("#text", "");
  await page.locator("#text").pressSequentially(type);
  await page.waitForFunction(
    (text) => spikebert.shown === text && document.querySelector("#status").textContent.includes(" ms for "),
    type,
  );
  const shown = await page.locator("#classes li").allInnerTexts();
  const status = await page.locator("#status").innerText();
  const lines = await page.locator("#chart polyline").count();
  return { shown, status, lines, errors };
}

try {
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await answer(JSON.parse(line))));
  }
} finally {
  await browser.close();
}
