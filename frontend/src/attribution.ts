// What each layer costs: horizontal bars of the accuracy that batch statistics there alone win back.

import { Attribution, num, Run } from "./answers";
import { h, nothing, onDemand, dataTable, update } from "./dom";
import { count, number, percent, points, shorten, siteName } from "./text";

const MOST = 15;

export function showAttribution(home: HTMLElement, run: Run, showLayer: (layer: string) => void): void {
  const found = run.attribution;
  update(home, [run.run, found], () => {
    if (!found) {
      return [
        nothing(
          "Not measured in this run.",
          "It is measured when running statistics cost accuracy: then the statistics of one layer at a time are swapped.",
        ),
      ];
    }
    const shown = found.costs.slice(0, MOST);
    const ends = shown.flatMap((cost) => [num(cost.recovered.gained), ...cost.recovered.interval.map(num)]).filter(Number.isFinite);
    const low = Math.min(0, ...ends);
    const width = Math.max(0.01, ...ends) - low;
    const share = (value: number): string => String(Number.isFinite(value) ? (value - low) / width : 0);
    return [
      h(
        "p",
        { class: "sentence" },
        `At step ${number(found.step)}, on ${count(found.examples, "example")} of the ${shorten(found.split, 20)} data: ` +
          `${percent(found.running)} with running statistics everywhere, ${percent(found.batch)} with batch statistics. ` +
          "A bar is what batch statistics in that layer alone win back, in points of accuracy; the thin line is its 95 % interval.",
      ),
      shown.length
        ? h(
            "ol",
            { class: "bars" },
            ...shown.map((cost) => {
              const bar = h("span", { class: "bar wide", "aria-hidden": "true" }, h("i"), h("b"));
              bar.style.setProperty("--zero", share(0));
              bar.style.setProperty("--value", share(num(cost.recovered.gained)));
              bar.style.setProperty("--low", share(num(cost.recovered.interval[0])));
              bar.style.setProperty("--high", share(num(cost.recovered.interval[1])));
              const name = siteName(cost.layer, cost.index, 0, 60);
              return h(
                "li",
                {},
                h("button", { type: "button", class: "link", "data-key": `attribution ${name}`, title: shorten(cost.layer, 300), onclick: () => showLayer(cost.layer) }, name),
                bar,
                h("span", { class: "value" }, points(cost.recovered.gained)),
              );
            }),
          )
        : h("p", { class: "muted" }, "No layer could be measured."),
      found.unmeasured.length ? h("p", { class: "muted small" }, `There was no time for ${count(found.unmeasured.length, "more layer")}.`) : null,
      shown.length ? onDemand("attribution numbers", () => numbers(found)) : null,
    ];
  });
}

function numbers(found: Attribution): HTMLElement {
  return dataTable(
    "What each layer costs",
    ["layer", "won back, points", "from", "to", "p-value", "lost the other way round, points"],
    found.costs.map((cost) => [
      siteName(cost.layer, cost.index),
      points(cost.recovered.gained),
      points(cost.recovered.interval[0]),
      points(cost.recovered.interval[1]),
      number(cost.recovered.p_value),
      points(cost.lost.gained),
    ]),
  );
}
