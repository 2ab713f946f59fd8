/** Side panels: next to the conversation on a wide screen, over it on a narrow one. */

import { byId } from "./dom.js";

export class Drawer {
  /** @type {HTMLElement | null} the element that had the focus before the panel opened */
  #previousFocus = null;

  /**
   * @param {HTMLElement} panel
   * @param {string} wide media query of the screens on which the panel is next to the conversation
   * @param {boolean} openWhenWide whether it is open by default on these screens
   */
  constructor(panel, wide, openWhenWide) {
    this.panel = panel;
    this.wide = matchMedia(wide);
    const fit = () => this.#set(openWhenWide && this.wide.matches);
    this.wide.addEventListener("change", fit);
    fit();
    byId("scrim").addEventListener("click", () => this.close());
  }

  /** @returns {boolean} whether the panel is open over the conversation */
  get covers() {
    return !this.panel.hidden && !this.wide.matches;
  }

  open() {
    this.#previousFocus = /** @type {HTMLElement | null} */ (document.activeElement);
    this.#set(true);
    this.panel.querySelector("button")?.focus();
  }

  /** Closes the panel if it is over the conversation. */
  close() {
    if (this.covers) this.dismiss();
  }

  dismiss() {
    this.#set(false);
    this.#previousFocus?.focus();
  }

  toggle() {
    if (this.panel.hidden) this.open();
    else this.dismiss();
  }

  /** @param {boolean} open */
  #set(open) {
    this.panel.hidden = !open;
    this.panel.classList.toggle("covers", this.covers);
    byId("scrim").hidden = !this.covers;
    byId("main").inert = this.covers; // keep the focus in the panel
  }
}
