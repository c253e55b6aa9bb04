// The pool's event stream. A connection that breaks, or stays silent, is made again by itself, more patiently each time.

const SILENCE_MILLISECONDS = 10_000; // a pulse comes every two seconds
const WAITS = [500, 1000, 2000, 4000, 8000];

export class Live {
  // `hear` has a function for each kind of item; `status(text, good)` is told how the connection does.
  constructor(hear, status) {
    this.hear = hear;
    this.status = status;
    this.attempts = 0;
    this.source = null;
    addEventListener("online", () => this.#now());
    document.addEventListener("visibilitychange", () => { if (!document.hidden && !this.source) this.#now(); });
    this.#connect();
  }

  #connect() {
    clearTimeout(this.retry);
    const source = this.source = new EventSource("/api/v1/stream");
    source.addEventListener("open", () => {
      this.attempts = 0;
      this.hear.open();
      this.status("live", true);
      this.#listen();
    });
    source.addEventListener("error", () => this.#lost());
    for (const [kind, handler] of Object.entries(this.hear)) {
      source.addEventListener(kind, (message) => {
        if (message.data === undefined) return;
        this.#listen();
        handler(JSON.parse(message.data));
      });
    }
  }

  #listen() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.#lost(), SILENCE_MILLISECONDS);
  }

  async #lost() {
    if (!this.source) return;
    this.source.close();
    this.source = null;
    clearTimeout(this.silence);
    const wait = WAITS[Math.min(this.attempts, WAITS.length - 1)];
    this.attempts += 1;
    this.status("connection lost, trying again", false);
    this.retry = setTimeout(() => this.#connect(), wait);
    // An event stream does not say why it was refused; a plain read does.
    const refused = await fetch("/api/v1/workers").then((response) => response.status === 401, () => false);
    if (refused) this.status("the token has ended: load the page again", false);
  }

  #now() {
    if (this.source) return;
    this.#connect();
  }
}
