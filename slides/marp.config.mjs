// "## English · 繁體中文": the part after the dot becomes a smaller line of its own kind (theme.css, .zh).
const twoLanguages = (md) =>
  md.core.ruler.after('inline', 'two_languages', ({ tokens, Token }) => {
    for (const [i, token] of tokens.entries()) {
      if (token.type !== 'inline' || tokens[i - 1]?.type !== 'heading_open') continue
      const at = token.children.findLastIndex((t) => t.type === 'text' && / · .*\p{Script=Han}/u.test(t.content))
      if (at < 0) continue
      const [english, chinese] = token.children[at].content.split(/ · (?=.*\p{Script=Han})/u)
      const parts = [english, chinese].map((content) => Object.assign(new Token('text', '', 0), { content }))
      const open = new Token('zh_open', 'span', 1)
      open.attrs = [['class', 'zh'], ['lang', 'zh-Hant']]
      token.children.splice(at, 1, parts[0], open, parts[1])
      token.children.push(new Token('zh_close', 'span', -1))
    }
  })

export default {
  engine: ({ marp }) => marp.use(twoLanguages),
  themeSet: './theme.css',
  allowLocalFiles: true, // the PDF shows our own figures
  options: { emoji: { unicode: false, shortcode: false } }, // no pictures from the network
}
