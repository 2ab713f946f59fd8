/** The model selector. */

import { listModels } from "./api.js";
import { byId, element } from "./dom.js";
import { readKey } from "./preferences.js";

/** @typedef {import("./api.js").Model} Model */

const STATE_LABELS = new Map([
  ["unloaded", " (loads on first use)"],
  ["loading", " (loading …)"],
  ["failed", " (could not be loaded)"],
]);

/** @param {Model} model */
function option({ id, state, description }) {
  return element("option", { value: id, title: description || null }, id + (STATE_LABELS.get(state) ?? ""));
}

/** @param {string} label @param {HTMLElement[]} options */
const group = (label, options) => element("optgroup", { label }, ...options);

export class Models {
  #select = /** @type {HTMLSelectElement} */ (byId("model"));
  /** @type {Model[]} */
  #all = [];

  /** @param {import("./chat.js").Chat} chat @param {() => void} changed */
  constructor(chat, changed) {
    this.chat = chat;
    this.changed = changed;
    this.#select.addEventListener("change", () => {
      void chat.change({ model: this.#select.value });
      this.show();
      changed();
    });
    chat.addEventListener("opened", () => this.show());
    this.show();
  }

  /** @returns {Model | null} the model of the open conversation */
  get current() {
    return this.#all.find(({ id }) => id === this.chat.conversation.model) ?? null;
  }

  /** Loads the list of models. Throws MoesaicError. */
  async load() {
    this.#all = await listModels(readKey());
    this.show();
    this.changed();
  }

  /** Shows the list. A conversation whose model is not available switches to the first model. */
  show() {
    const { conversation } = this.chat;
    if (this.#all.length > 0 && !this.current) conversation.model = this.#all[0].id;
    const presets = this.#all.filter(({ parent }) => parent);
    const models = this.#all.filter(({ parent }) => !parent).map(option);
    this.#select.replaceChildren(
      ...(presets.length === 0 ? models : [group("Models", models), group("Presets", presets.map(option))]),
    );
    this.#select.disabled = this.#all.length === 0;
    this.#select.title = this.current?.description ?? "";
    if (this.#all.length === 0) this.#select.append(element("option", {}, "No model"));
    else this.#select.value = conversation.model;
  }
}
