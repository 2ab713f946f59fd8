/** Short messages above the message field, some with something to do about them. */

import { byId, element, icon, textButton } from "./dom.js";

const SHOWN = 8000; // ms
const MOST = 3;

/**
 * Shows a message; the same one is not shown twice at a time.
 * @param {string} text
 * @param {{label: string, run: () => void}} [action]
 */
export function notify(text, action) {
  const root = byId("notices");
  for (const shown of root.children) if (shown.firstChild?.textContent === text) shown.remove();
  const close = element("button", { type: "button", class: "icon-button", "aria-label": "Dismiss" }, icon("close"));
  const notice = element("div", { class: "notice" }, element("span", {}, text), close);
  close.addEventListener("click", () => notice.remove());
  if (action) {
    close.before(
      textButton(action.label, "quiet-button", () => {
        notice.remove();
        action.run();
      }),
    );
  }
  root.append(notice);
  while (root.children.length > MOST) root.firstChild?.remove();
  dismissLater(notice);
}

/** @param {HTMLElement} notice which stays for as long as the reader is at it */
function dismissLater(notice) {
  setTimeout(() => {
    if (notice.matches(":hover, :focus-within")) dismissLater(notice);
    else notice.remove();
  }, SHOWN);
}
