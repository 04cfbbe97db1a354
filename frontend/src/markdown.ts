// A rule's page: the part of Markdown that such pages use, as elements. Anything else stays text.

import { Child, h } from "./dom";
import { clean } from "./text";

/** Text whose code spans and strong words are elements. */
export function inline(text: string): Child[] {
  return text
    .split(/(`[^`]+`|\*\*[^*]+\*\*)/)
    .filter(Boolean)
    .map((part) =>
      part.length > 2 && part.startsWith("`") && part.endsWith("`") ? h("code", {}, clean(part.slice(1, -1)))
      : part.length > 4 && part.startsWith("**") && part.endsWith("**") ? h("strong", {}, clean(part.slice(2, -2)))
      : clean(part),
    );
}

/** A page as elements; its title is left out, headings begin at `level`. */
export function page(markdown: string, level = 3): Child[] {
  return blocks(markdown.split("\n"), level);
}

function blocks(lines: string[], level: number): Child[] {
  const found: Child[] = [];
  let at = 0;
  const take = (while_: (line: string) => boolean): string[] => {
    const from = at;
    while (at < lines.length && while_(lines[at] ?? "")) at += 1;
    return lines.slice(from, at);
  };
  while (at < lines.length) {
    const line = lines[at] ?? "";
    const heading = /^(#{1,4}) +(.*)$/.exec(line);
    if (!line.trim()) at += 1;
    else if (heading) {
      at += 1;
      const depth = heading[1]?.length ?? 1;
      if (depth > 1) found.push(h(`h${Math.min(level + depth - 2, 6)}` as "h3", {}, ...inline(heading[2] ?? "")));
    } else if (line.startsWith("    ")) {
      const code = take((one) => one.startsWith("    ") || !one.trim());
      found.push(pre(code.map((one) => one.slice(4))));
    } else if (line.startsWith("```")) {
      at += 1;
      found.push(pre(take((one) => !one.startsWith("```"))));
      at += 1;
    } else if (/^[-*] /.test(line)) found.push(h("ul", {}, ...items(take(inList), /^[-*] /, level)));
    else if (/^\d+\. /.test(line)) found.push(h("ol", {}, ...items(take(inList), /^\d+\. /, level)));
    else if (line.startsWith("|")) found.push(table(take((one) => one.startsWith("|"))));
    else {
      const text = take((one) => !!one.trim() && !/^(#{1,4} |```|\||[-*] |\d+\. )/.test(one));
      if (!text.length) text.push(lines[at++] ?? "");
      found.push(h("p", {}, ...inline(text.join(" "))));
    }
  }
  return found;
}

function inList(line: string): boolean {
  return !line.trim() || /^([-*] |\d+\. | {2,})/.test(line);
}

function items(lines: string[], mark: RegExp, level: number): HTMLElement[] {
  const groups: string[][] = [];
  let indent = 0;
  for (const line of lines) {
    const found = mark.exec(line);
    indent = found?.[0].length ?? indent;
    if (found) groups.push([line.slice(indent)]);
    else groups.at(-1)?.push(line.slice(Math.min(indent, line.search(/\S|$/))));
  }
  return groups.map((group) => h("li", {}, ...blocks(group, level)));
}

function pre(lines: string[]): HTMLElement {
  const code = lines.join("\n").trimEnd();
  return h("pre", { tabindex: 0 }, h("code", {}, code.split("\n").map(clean).join("\n")));
}

function table(lines: string[]): HTMLElement {
  const cells = (line: string): string[] => line.replace(/^\||\|\s*$/g, "").split("|").map((cell) => cell.trim());
  const [head = "", , ...rows] = lines;
  return h(
    "table",
    { class: "data" },
    h("thead", {}, h("tr", {}, ...cells(head).map((cell) => h("th", { scope: "col" }, ...inline(cell))))),
    h("tbody", {}, ...rows.map((row) => h("tr", {}, ...cells(row).map((cell) => h("td", {}, ...inline(cell)))))),
  );
}
