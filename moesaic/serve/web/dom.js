/** Makes elements. The page has no other way to: nothing here or elsewhere parses HTML. */

/**
 * Returns a new element. Children that are null are left out.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | null>} [attributes] those that are null are left out
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
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
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  made.append(use);
  return made;
}

/**
 * Returns a button that shows an icon; the label is its name and its tip.
 * @param {string} name the icon's
 * @param {string} label
 * @param {(event: MouseEvent) => void} action
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, action) {
  const made = element("button", { type: "button", class: "icon-button", "aria-label": label, title: label }, icon(name));
  made.addEventListener("click", action);
  return made;
}

/**
 * Returns a button that shows its label.
 * @param {string} label
 * @param {string} style a class
 * @param {(event: MouseEvent) => void} action
 * @returns {HTMLButtonElement}
 */
export function textButton(label, style, action) {
  const made = element("button", { type: "button", class: style }, label);
  made.addEventListener("click", action);
  return made;
}

/**
 * Puts a text on the clipboard.
 * @param {string} text
 * @returns {Promise<boolean>} whether that was possible
 */
export async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Over plain HTTP browsers offer no clipboard, only this.
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
 * Hands the reader a file.
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after the click
}
