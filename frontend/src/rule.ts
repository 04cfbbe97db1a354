// A rule's page in a panel beside the diagnoses.

import { Rule } from "./answers";
import { h, icon, nothing } from "./dom";
import { inline, page } from "./markdown";
import { get } from "./source";
import { clean, shorten } from "./text";

export class RulePanel {
  private readonly title = h("h2", { id: "rule-title" });
  private readonly body = h("div", { class: "prose" });
  private readonly close = h("button", { type: "button", class: "quiet", onclick: () => this.element.close() }, icon("close"), "Close");
  readonly element = h(
    "dialog",
    { class: "rule", "aria-labelledby": "rule-title" },
    h("div", { class: "head" }, this.title, this.close),
    this.body,
  );
  private asked = "";

  constructor(closed: () => void) {
    this.element.addEventListener("close", closed);
    this.element.addEventListener("click", (event) => {
      if (event.target === this.element) this.element.close();
    });
  }

  async open(rule: string): Promise<void> {
    this.asked = rule;
    this.title.textContent = shorten(rule, 20);
    this.body.replaceChildren(h("p", { class: "muted" }, "Loading\u2026"));
    if (!this.element.open) this.element.showModal();
    try {
      const found = await get<Rule>("rule", { rule });
      if (this.asked !== rule) return;
      this.title.textContent = `${clean(found.rule)} ${clean(found.name)}`;
      this.body.replaceChildren(
        ...[h("p", { class: "lead" }, ...inline(found.summary)), ...page(found.markdown)].filter((one): one is HTMLElement | string => !!one),
      );
    } catch (error) {
      this.body.replaceChildren(nothing("This page cannot be shown.", `${String((error as Error).message)} In a terminal: bnwatch explain ${shorten(rule, 20)}`));
    }
  }
}
