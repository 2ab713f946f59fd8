/** While an answer has not begun: follows the state of its model, and says that the model is being loaded. */

const POLL_MS = 1500;

export class Waking {
  /** @type {number | undefined} */
  #timer;

  /**
   * @param {import("./chat.js").Chat} chat
   * @param {import("./models.js").Models} models
   * @param {import("./messages.js").MessagesView} messages
   */
  constructor(chat, models, messages) {
    this.chat = chat;
    this.models = models;
    this.messages = messages;
    for (const event of ["opened", "grew", "ended"]) chat.addEventListener(event, () => this.#watch());
  }

  #watch() {
    clearTimeout(this.#timer);
    const { generation } = this.chat;
    if (!generation || generation.begun) return;
    const model = this.models.current;
    const wakes = model !== null && model.state !== "loaded";
    this.messages.showLoading(wakes ? (model.parent ?? model.id) : "");
    this.#timer = setTimeout(() => void this.#refresh(), POLL_MS);
  }

  async #refresh() {
    // An error has no consequence here: the request for the answer shows it.
    await this.models.load().catch(() => undefined);
    this.#watch();
  }
}
