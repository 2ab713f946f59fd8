/** The buttons for the theme: light, dark or the system's. */

import { byId, iconButton } from "./dom.js";
import { readTheme, writeTheme } from "./preferences.js";

/** Adds the buttons to the page. */
export function showThemeButtons() {
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
