/** The panel with the system prompt and the sampling settings of the open conversation. */

import { byId, element } from "./dom.js";
import { LANGUAGES } from "./examples.js";
import { SETTINGS, clamp, validSettings } from "./sampling.js";

/** @typedef {import("./sampling.js").Setting} Setting */

export class SettingsView {
  #system = /** @type {HTMLTextAreaElement} */ (byId("system"));
  #example = /** @type {HTMLSelectElement} */ (byId("example"));
  /** @type {Map<string, {slider: HTMLInputElement | null, number: HTMLInputElement}>} */
  #fields = new Map();

  /** @param {import("./chat.js").Chat} chat @param {() => void} changed */
  constructor(chat, changed) {
    this.chat = chat;
    this.changed = changed;
    byId("sampling").append(...SETTINGS.map((setting) => this.#field(setting)));
    byId("reset").addEventListener("click", () => this.#store({ settings: {} }));
    this.#system.addEventListener("change", () => this.#store({ system: this.#system.value }));
    this.#fillExamples();
    chat.addEventListener("opened", () => this.show());
    this.show();
  }

  #fillExamples() {
    const groups = LANGUAGES.map(({ language, code, examples }) =>
      element(
        "optgroup",
        { label: language, lang: code },
        ...examples.map(({ name, system }) => element("option", { value: system }, name)),
      ),
    );
    this.#example.append(element("option", { value: "" }, "Custom or none"), ...groups);
    this.#example.addEventListener("change", () => this.#store({ system: this.#example.value }));
  }

  /** @param {Setting} setting @returns {HTMLElement} */
  #field({ name, label, hint, min, max, step, standard }) {
    const [id, hintId] = [`setting-${name}`, `hint-${name}`];
    const range = { min: String(min), max: String(max), step: String(step) };
    const number = element("input", { type: "number", id, "aria-describedby": hintId, inputmode: "decimal", ...range });
    if (standard === null) number.placeholder = "random";
    const slider = standard === null ? null : element("input", { type: "range", "aria-label": `${label}, slider`, ...range });
    this.#fields.set(name, { slider, number });
    // The number follows the slider at once; the value is stored when the slider is released.
    slider?.addEventListener("input", () => (number.value = slider.value));
    for (const input of [slider, number]) {
      input?.addEventListener("change", () => this.#set(name, input.value));
    }
    const head = element("div", { class: "setting-head" }, element("label", { for: id }, label), number);
    return element("div", { class: "setting" }, head, slider, element("p", { class: "hint", id: hintId }, hint));
  }

  /** @param {string} name @param {string} typed */
  #set(name, typed) {
    const value = typed.trim() === "" ? null : clamp(name, Number(typed));
    this.#store({ settings: validSettings({ ...this.chat.conversation.settings, [name]: value }) });
  }

  /** @param {Partial<import("./conversation.js").Conversation>} fields */
  #store(fields) {
    void this.chat.change(fields);
    this.show();
    this.changed();
  }

  /** Shows the settings of the open conversation. */
  show() {
    const { system, settings } = this.chat.conversation;
    this.#system.value = system;
    this.#example.value = system;
    if (this.#example.selectedIndex < 0) this.#example.value = "";
    for (const { name, standard } of SETTINGS) {
      const shown = String(settings[name] ?? standard ?? "");
      const { slider, number } = /** @type {{slider: HTMLInputElement | null, number: HTMLInputElement}} */ (this.#fields.get(name));
      number.value = shown;
      if (slider) slider.value = shown;
    }
  }
}
