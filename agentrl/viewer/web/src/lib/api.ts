/** The server's answers. An error is one sentence, as the server said it, or what to do where it said nothing. */
export class ApiError extends Error {
  constructor(
    public status: number,
    message: string,
  ) {
    super(message)
  }
}

type Query = Record<string, string | number | null | undefined>

export function url(path: string, query: Query = {}): string {
  const asked = new URLSearchParams()
  for (const [name, value] of Object.entries(query)) if (value !== null && value !== undefined && value !== '') asked.set(name, String(value))
  const text = asked.toString()
  return `api/${path}${text ? `?${text}` : ''}`
}

async function ask(address: string, init: RequestInit): Promise<Response> {
  let reply: Response
  try {
    reply = await fetch(address, { credentials: 'same-origin', ...init })
  } catch (error) {
    if ((error as Error).name === 'AbortError') throw error
    throw new ApiError(0, 'The viewer’s server does not answer. Is `agentrl view` still running?')
  }
  if (reply.ok) return reply
  let said = ''
  try {
    said = (await reply.json()).error
  } catch {
    // not JSON: the status says enough
  }
  throw new ApiError(reply.status, said || `The server answered ${reply.status} ${reply.statusText}.`)
}

export async function get<T>(path: string, query: Query = {}, signal?: AbortSignal): Promise<T> {
  return (await ask(url(path, query), { signal })).json()
}

let early: { address: string; answer: Promise<ArrayBuffer> } | null = null

/** Ask for what will most likely be wanted next; the last such answer waits for `binary` to want it. */
export function ahead(path: string, query: Query = {}): void {
  const address = url(path, query)
  if (early?.address === address) return
  const answer = ask(address, {}).then((reply) => reply.arrayBuffer())
  answer.catch(() => early?.address === address && (early = null)) // whoever wants it asks again, and is told why
  early = { address, answer }
}

export async function binary(path: string, query: Query = {}): Promise<ArrayBuffer> {
  const address = url(path, query)
  if (early?.address !== address) return (await ask(address, {})).arrayBuffer()
  const { answer } = early
  early = null
  return answer
}

export async function post<T>(path: string, body: unknown): Promise<T> {
  return (await ask(`api/${path}`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })).json()
}
