// Bundles src/ into the one file that is shipped; --check compares it with the committed one instead of writing it.
import { readFile, writeFile, mkdir, copyFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = new URL(".", import.meta.url);
const home = new URL("../bnwatch/dashboard/static/", here);
const file = new URL("index.js", home);
const licence = new URL("uPlot.LICENSE.txt", home);

const result = await build({
  absWorkingDir: fileURLToPath(here),
  entryPoints: ["src/index.ts"],
  bundle: true,
  minify: true,
  charset: "ascii",
  target: "es2021",
  format: "iife",
  globalName: "page",
  loader: { ".css": "text" },
  legalComments: "none",
  banner: { js: "/* bnwatch: built from frontend/ by `make page`. Holds uPlot (MIT), see uPlot.LICENSE.txt. */" },
  // A name that is not shortened: the HTML report, where this stands inline, calls it.
  footer: { js: "export function render() { return page.render(); }" },
  write: false,
});
const built = Buffer.from(result.outputFiles[0].contents);

if (process.argv.includes("--check")) {
  const committed = await readFile(file).catch(() => Buffer.alloc(0));
  const same = Buffer.compare(built, committed) === 0;
  const text = await readFile(licence).catch(() => Buffer.alloc(0));
  const licensed = Buffer.compare(text, await readFile(new URL("node_modules/uplot/LICENSE", here))) === 0;
  if (!same || !licensed) {
    console.error("bnwatch/dashboard/static/ is not what frontend/ makes: run `make page` and commit the result");
    process.exit(1);
  }
  console.log(`bnwatch/dashboard/static/index.js is current, ${built.length.toLocaleString("en")} bytes`);
} else {
  await mkdir(home, { recursive: true });
  await writeFile(file, built);
  await copyFile(new URL("node_modules/uplot/LICENSE", here), licence);
  console.log(`bnwatch/dashboard/static/index.js: ${built.length.toLocaleString("en")} bytes`);
}
