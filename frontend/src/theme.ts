// Light or dark, as TensorBoard or the system has it.

import { isReport } from "./source";

const listeners = new Set<() => void>();

export function isDark(): boolean {
  return document.documentElement.dataset["theme"] === "dark";
}

/** Call back when colours change: what is drawn on a canvas must be drawn again. */
export function onTheme(listener: () => void): void {
  listeners.add(listener);
}

/** The value of a colour token. */
export function color(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export function followTheme(): void {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const body = tensorBoardBody();
  const set = (): void => {
    const theme = (body ? body.classList.contains("dark-mode") : system.matches) ? "dark" : "light";
    if (document.documentElement.dataset["theme"] === theme) return;
    document.documentElement.dataset["theme"] = theme;
    for (const listener of listeners) listener();
  };
  set();
  system.addEventListener("change", set);
  if (body) new MutationObserver(set).observe(body, { attributeFilter: ["class"] });
}

function tensorBoardBody(): HTMLElement | null {
  try {
    return isReport() || window.parent === window ? null : window.parent.document.body;
  } catch {
    return null;
  }
}
