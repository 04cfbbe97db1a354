// A picture with its title, a sentence that says what is in it, and the numbers on demand.

import { Child, h, onDemand } from "./dom";

export class Figure {
  readonly element: HTMLElement;
  readonly tools: HTMLElement;
  private readonly sentence: HTMLElement;
  private readonly body: HTMLElement;
  private readonly message: HTMLElement;
  private readonly numbers: HTMLElement;
  private readonly heading: HTMLElement;
  private numbersOpen: HTMLDetailsElement | null = null;

  constructor(key: string, title: string, tools: Child[], body: Child[]) {
    this.heading = h("h3", { id: `${key}-title` }, title);
    this.tools = h("div", { class: "tools" }, ...tools);
    this.sentence = h("p", { class: "sentence", id: `${key}-sentence` });
    this.body = h("div", { class: "picture", hidden: true }, ...body);
    this.message = h("div", { class: "message" });
    this.numbers = h("div", {});
    this.element = h(
      "figure",
      { class: "figure", "data-figure": key, "aria-labelledby": `${key}-title`, "aria-describedby": `${key}-sentence` },
      h("div", { class: "head" }, this.heading, this.tools),
      this.sentence,
      this.body,
      this.message,
      this.numbers,
    );
    this.loading();
  }

  title(text: string): void {
    this.heading.textContent = text;
  }

  /** There is something to see. */
  show(sentence: string, numbers: (() => HTMLElement) | null): void {
    this.element.removeAttribute("aria-busy");
    this.sentence.textContent = sentence;
    this.body.hidden = false;
    this.message.replaceChildren();
    const open = this.numbersOpen?.open ?? false;
    this.numbersOpen = numbers ? onDemand(this.element.dataset["figure"] ?? "", numbers) : null;
    this.numbers.replaceChildren(...(this.numbersOpen ? [this.numbersOpen] : []));
    if (this.numbersOpen) this.numbersOpen.open = open;
  }

  /** There is nothing to see, and why. */
  blank(...message: Child[]): void {
    this.element.removeAttribute("aria-busy");
    this.sentence.textContent = "";
    this.body.hidden = true;
    this.numbersOpen = null;
    this.numbers.replaceChildren();
    this.message.replaceChildren(...message.filter((one): one is Node | string => !!one));
  }

  loading(): void {
    this.element.setAttribute("aria-busy", "true");
    if (this.body.hidden) this.message.replaceChildren(h("p", { class: "muted" }, "Loading\u2026"));
  }
}

/** At most `limit` of the items, the first and the last among them. */
export function thinned<T>(items: T[], limit = 200): T[] {
  if (items.length <= limit) return items;
  const stride = (items.length - 1) / (limit - 1);
  return Array.from({ length: limit }, (_, at) => items[Math.round(at * stride)] as T);
}
