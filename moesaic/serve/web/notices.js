/** Short messages above the message field, with an optional action. */

import { byId, element, icon, textButton } from "./dom.js";

const DURATION_MS = 8000;
const MAX_NOTICES = 3;

/**
 * Shows a message. It replaces an equal message that is still shown.
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
  while (root.children.length > MAX_NOTICES) root.firstChild?.remove();
  dismissLater(notice);
}

/** Removes a notice after a while, but not while the reader points at it or has focused it. @param {HTMLElement} notice */
function dismissLater(notice) {
  setTimeout(() => {
    if (notice.matches(":hover, :focus-within")) dismissLater(notice);
    else notice.remove();
  }, DURATION_MS);
}
