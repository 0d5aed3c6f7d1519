// Looks at every page of the built site in headless Chromium, light, dark and on a phone, and fails on what axe-core
// finds, on anything asked of another host, on errors of scripts and on pages wider than a phone.
//   npm install --no-save axe-core puppeteer-core && node docs/accessibility.mjs FOLDER [--shots FOLDER] [PAGE ...]
import { mkdirSync, readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "node_modules", "_"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const words = process.argv.slice(2);
const at = words.indexOf("--shots");
const shots = at < 0 ? null : words.splice(at, 2)[1];
const [folder, ...wanted] = words;
const pages = wanted.length
  ? wanted
  : readdirSync(folder, { recursive: true }).filter((name) => name.endsWith(".html") && !name.startsWith("_"));
// In the dark only the colors differ.
const views = [
  ["light", "light", 1280, {}],
  ["dark", "dark", 1280, { runOnly: ["color-contrast", "link-in-text-block"] }],
  ["phone", "light", 390, {}],
];

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
let faults = 0;
const fault = (...text) => (faults++, console.log(...text));
for (const name of pages.sort()) {
  const page = await browser.newPage();
  page.on("request", (asked) => /^https?:/.test(asked.url()) && fault(name, "asks for", asked.url()));
  page.on("pageerror", (error) => fault(name, error.message));
  await page.setViewport({ width: views[0][2], height: 900 });
  await page.goto(pathToFileURL(resolve(folder, name)).href, { waitUntil: "load" });
  await page.evaluate(axe);
  for (const [view, scheme, width, rules] of views) {
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.waitForFunction((theme) => document.documentElement.dataset.theme === theme, {}, scheme);
    await new Promise((done) => setTimeout(done, 500)); // the theme looks for what scrolls 0.3 s after a change of width
    const found = await page.evaluate((given) => axe.run({ resultTypes: ["violations"], ...given }), rules);
    for (const { id, impact, nodes } of found.violations)
      for (const node of nodes.slice(0, 3)) fault(name, view, id, impact, node.target.join(" "), node.any[0]?.message ?? "");
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (wide > 0) fault(name, view, `is ${wide} pixels wider than the screen`);
    if (shots) {
      mkdirSync(shots, { recursive: true });
      await page.screenshot({ path: join(shots, `${name.replaceAll("/", "-").slice(0, -5)}-${view}.png`) });
    }
  }
  await page.close();
}
await browser.close();
console.log(`${pages.length} pages in ${views.length} views: ${faults} faults`);
process.exit(faults ? 1 : 0);
