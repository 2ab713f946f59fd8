/** One message on the page: its text, its buttons and its editor. */

import { copy, element, icon, iconButton, textButton } from "./dom.js";
import { MarkdownView } from "./render.js";

/**
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {{editQuestion: (message: Message, text: string) => void,
 *   editAnswer: (message: Message, text: string, continueFrom: boolean) => void,
 *   regenerate: (message: Message) => void, continueAnswer: () => void}} Actions actions of the buttons
 */

const CUT_MESSAGES = Object.freeze({
  stopped: "Stopped before the end.",
  length: "Reached the token limit.",
  failed: "Ended by an error.",
});

export class MessageView {
  /** @type {MarkdownView | null} */
  #markdown = null;
  #body;
  #tools;
  #foot = element("div", { class: "message-foot" });
  #writing = false;

  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const answer = message.role === "assistant";
    this.#body = element("div", { class: "body" });
    this.#tools = element("div", { class: "tools", role: "group", "aria-label": "Actions" });
    this.node = element(
      "article",
      { class: `message ${message.role}`, "aria-label": answer ? "Answer" : "You" },
      this.#body,
      this.#foot,
      this.#tools,
    );
    this.#show();
    this.#tools.append(...this.#buttons(answer));
    if (answer && message.model) this.#tools.append(element("span", { class: "by" }, message.model));
  }

  #show() {
    this.#body.replaceChildren();
    if (this.message.role === "assistant") {
      this.#markdown = new MarkdownView(this.#body);
      this.#markdown.grow(this.message.content);
    } else {
      this.#body.append(element("div", { class: "plain", dir: "auto" }, this.message.content));
    }
  }

  /** @param {boolean} answer @returns {HTMLButtonElement[]} */
  #buttons(answer) {
    const { message, actions } = this;
    const copyButton = iconButton("copy", "Copy", () => void copyAndTell(message.content, copyButton));
    const edit = iconButton("edit", answer ? "Edit the answer" : "Edit", () => this.edit());
    if (!answer) return [copyButton, edit];
    return [copyButton, edit, iconButton("again", "Regenerate", () => actions.regenerate(message))];
  }

  /** Shows the text that was added to the message. */
  grow() {
    this.#markdown?.grow(this.message.content);
  }

  /** @returns {HTMLElement[]} the blocks that were completed since the last call */
  takeSettled() {
    return this.#markdown?.takeSettled() ?? [];
  }

  /** @returns {readonly HTMLElement[]} the blocks at the end of the text, which may still change */
  get tail() {
    return this.#markdown?.tail ?? [];
  }

  /**
   * Updates the buttons for the state of the conversation.
   * @param {{last: boolean, writing: boolean, busy: boolean}} state `writing`: this answer is in progress; `busy`: an
   *   answer of the conversation is in progress
   */
  update({ last, writing, busy }) {
    this.#writing = writing;
    this.node.classList.toggle("writing", writing);
    this.node.classList.toggle("last", last);
    for (const button of this.#tools.querySelectorAll("button")) button.disabled = busy && button.ariaLabel !== "Copy";
    this.#showFoot(last, busy);
  }

  /** @param {boolean} last @param {boolean} busy */
  #showFoot(last, busy) {
    const { cut } = this.message;
    const parts = [];
    if (cut && !this.#writing) parts.push(element("span", { class: "cut" }, CUT_MESSAGES[cut]));
    if (cut && last && !busy) {
      const proceed = textButton("Continue", "quiet-button", () => this.actions.continueAnswer());
      proceed.prepend(icon("continue"));
      parts.push(proceed);
    }
    this.#foot.replaceChildren(...parts);
  }

  /** Replaces the text by an editor. */
  edit() {
    const { message, actions } = this;
    const area = element("textarea", { class: "editor", dir: "auto", "aria-label": "Edit the text" });
    area.value = message.content;
    const close = () => {
      this.node.classList.remove("editing");
      this.#show();
      /** @type {HTMLElement | null} */ (this.#tools.children[1])?.focus();
    };
    /** @type {[string, () => void][]} Ctrl+Enter runs the first */
    const choices =
      message.role === "user"
        ? [["Send", () => actions.editQuestion(message, area.value)]]
        : [
            ["Save and continue", () => actions.editAnswer(message, area.value, true)],
            ["Save", () => actions.editAnswer(message, area.value, false)],
          ];
    const buttons = choices.map(([label, run], index) =>
      textButton(label, index === 0 ? "main-button" : "plain-button", () => area.value.trim() && run()),
    );
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) buttons[0].click();
      else return;
      event.preventDefault();
      event.stopPropagation(); // elsewhere, Escape stops the answer
    });
    const row = element("div", { class: "buttons" }, textButton("Cancel", "plain-button", close), ...buttons.toReversed());
    this.node.classList.add("editing");
    this.#body.replaceChildren(area, row);
    area.focus();
    fit(area);
    area.addEventListener("input", () => fit(area));
  }
}

/**
 * Makes a text field as high as its text, up to the limit in the style sheet.
 * @param {HTMLTextAreaElement} area
 */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/**
 * Copies a text and shows the result on the button for a moment.
 * @param {string} text
 * @param {HTMLButtonElement} button
 */
export async function copyAndTell(text, button) {
  const done = await copy(text);
  const shown = button.querySelector("svg");
  const mark = icon(done ? "check" : "close");
  shown?.replaceWith(mark);
  setTimeout(() => mark.replaceWith(icon("copy")), 1500);
}
