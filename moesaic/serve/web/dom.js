/** Creates elements. All of the page's elements come from here or from the HTML file; no script parses HTML. */

/**
 * Returns a new element; children that are null are left out.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | null>} [attributes] null values are left out
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function element(tag, attributes = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) created.setAttribute(name, value);
  }
  created.append(...children.filter((child) => child !== null));
  return created;
}

/**
 * Returns the element with this id.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export const byId = (id) => /** @type {T} */ (document.getElementById(id));

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns one of the icons that index.html defines.
 * @param {string} name
 * @returns {SVGSVGElement}
 */
export function icon(name) {
  const created = document.createElementNS(SVG, "svg");
  created.setAttribute("class", "icon");
  created.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  created.append(use);
  return created;
}

/**
 * Returns a button with an icon; the label is its accessible name and its tooltip.
 * @param {string} name of the icon
 * @param {string} label
 * @param {(event: MouseEvent) => void} action
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, action) {
  const created = element("button", { type: "button", class: "icon-button", "aria-label": label, title: label }, icon(name));
  created.addEventListener("click", action);
  return created;
}

/**
 * Returns a button with a text label.
 * @param {string} label
 * @param {string} style CSS class
 * @param {(event: MouseEvent) => void} action
 * @returns {HTMLButtonElement}
 */
export function textButton(label, style, action) {
  const created = element("button", { type: "button", class: style }, label);
  created.addEventListener("click", action);
  return created;
}

/**
 * Copies a text to the clipboard.
 * @param {string} text
 * @returns {Promise<boolean>} whether it succeeded
 */
export async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Over plain HTTP, browsers have no clipboard API, only this command.
  const carrier = element("textarea", { class: "visually-hidden", readonly: "" });
  const focused = document.activeElement;
  carrier.value = text;
  document.body.append(carrier);
  carrier.select();
  const done = document.execCommand("copy");
  carrier.remove();
  if (focused instanceof HTMLElement) focused.focus();
  return done;
}

/**
 * Offers a file as a download.
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads the file after the click
}
