/** Panels at the side: beside the conversation where there is room, above it where there is none. */

import { byId } from "./dom.js";

export class Drawer {
  /** @type {HTMLElement | null} where the keyboard was before */
  #from = null;

  /**
   * @param {HTMLElement} panel
   * @param {string} room a media query: then the panel lies beside the conversation
   * @param {boolean} standing whether it is open by itself where there is room
   */
  constructor(panel, room, standing) {
    this.panel = panel;
    this.room = matchMedia(room);
    const fit = () => this.#set(standing && this.room.matches);
    this.room.addEventListener("change", fit);
    fit();
    byId("scrim").addEventListener("click", () => this.close());
  }

  /** @returns {boolean} whether it lies above the conversation */
  get covers() {
    return !this.panel.hidden && !this.room.matches;
  }

  open() {
    this.#from = /** @type {HTMLElement | null} */ (document.activeElement);
    this.#set(true);
    this.panel.querySelector("button")?.focus();
  }

  /** Closes the panel if it covers the conversation. */
  close() {
    if (this.covers) this.dismiss();
  }

  dismiss() {
    this.#set(false);
    this.#from?.focus();
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
    byId("main").inert = this.covers; // the keyboard stays in the panel
  }
}
