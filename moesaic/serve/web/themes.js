/** The choice between light, dark and what the system says. */

import { byId, iconButton } from "./dom.js";
import { readTheme, writeTheme } from "./preferences.js";

/** Fills the group of buttons. */
export function offerThemes() {
  const buttons = ["Light", "Dark", "System"].map((label) => {
    const theme = label.toLowerCase();
    const button = iconButton(theme, label, () => {
      writeTheme(theme);
      mark();
    });
    button.dataset.theme = theme;
    return button;
  });
  const mark = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.theme === readTheme()));
  };
  byId("themes").append(...buttons);
  mark();
}
